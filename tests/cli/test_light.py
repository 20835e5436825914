"""``kvcar --version`` and ``--help`` are quick, and list commands by what a user does."""

import re
import subprocess
import sys

import pytest
import typer
from commands import run

import kvcar.cli
from kvcar.cli import app, console
from kvcar.cli.app import PANELS
from kvcar.errors import InputError

HEAVY = "torch|transformers|numpy|matplotlib|safetensors|jinja2|yaml|gguf|accelerate"


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["eval", "--help"], ["paper", "--help"]])
def test_nothing_heavy_is_imported_before_a_command_runs(arguments):
    command = [sys.executable, "-X", "importtime", "-m", "kvcar", *arguments]
    imported = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert not re.findall(rf"\| +((?:{HEAVY})(?:\..*)?)$", imported, re.MULTILINE)
    assert "kvcar.cli.evaluate" in imported


def test_help_lists_commands_by_what_a_user_does():
    commands = typer.main.get_command(app).commands
    assert sorted(commands) == sorted(name for names in PANELS.values() for name in names)
    printed = run("--help")
    places = [printed.index(panel) for panel in PANELS]
    assert places == sorted(places)
    assert printed.index(" fit ") < printed.index(" eval ") < printed.index(" demo ") < printed.index(" save ")


@pytest.mark.parametrize("start", ["from kvcar.cli import main; main()", "import runpy; runpy.run_module('kvcar')"])
@pytest.mark.parametrize("package", ["typer", "rich", "rich.console"])
def test_without_the_extra_the_command_says_in_one_line_what_to_install(start, package):
    code = f"import sys; sys.modules[{package!r}] = None\n{start}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    lacks = package.split(".")[0]
    assert (
        result.stderr == f"kvcar's command line needs the package {lacks}; install it with: pip install 'kvcar[cli]'\n"
    )


def main_of(monkeypatch, capsys, error):
    """What ``kvcar`` prints on stderr where a command raises an error, and how it exits."""

    def raises():
        raise error

    monkeypatch.setattr(kvcar.cli, "app", raises)
    with pytest.raises(SystemExit) as ended:
        kvcar.cli.main()
    code = ended.value.code
    return (code if isinstance(code, str) else capsys.readouterr().err), code


@pytest.mark.parametrize("package", ["yaml", "jinja2", "matplotlib"])
def test_packages_that_are_missed_later_are_named_too(monkeypatch, capsys, package):
    missing = ModuleNotFoundError(f"No module named {package!r}", name=f"{package}.inner")
    printed, code = main_of(monkeypatch, capsys, missing)
    assert f"needs the package {package}; install it with: pip install 'kvcar[cli]'" in printed
    assert code != 0


def test_other_missing_modules_are_no_business_of_the_extra(monkeypatch):
    def raises():
        raise ModuleNotFoundError("No module named 'nonsense'", name="nonsense")

    monkeypatch.setattr(kvcar.cli, "app", raises)
    with pytest.raises(ModuleNotFoundError):
        kvcar.cli.main()


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("give times_smaller or max_kl, not both", "give --times-smaller or --max-kl, not both"),
        ("b already holds a bundle; choose another folder or ask to overwrite it", "replace it with --force"),
        ("or save with keep_window=True", "or save with --keep-window"),
        ("cannot read the text /a/times_smaller/max_kl.txt", "/a/times_smaller/max_kl.txt"),
    ],
)
def test_messages_name_options_as_the_command_line_does(monkeypatch, capsys, message, shown):
    printed, code = main_of(monkeypatch, capsys, InputError(message))
    assert shown in printed
    assert code == 1


def test_progress_is_printed_now_and_then_where_there_is_no_terminal(capsys, monkeypatch):
    clock = iter([0.0, *(10.0 * n for n in range(20))])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    tell = console.progress_lines(every_seconds=15)
    for done in range(7):
        tell("work", done, 6)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["work: 2 of 6, about 40 s left", "work: 4 of 6, about 20 s left", "work: done, 60 s"]
