"""``kvcar --version`` and ``--help`` are quick, and list commands by what a user does."""

import re
import subprocess
import sys

import pytest
import typer
from commands import run

from kvcar.cli import app
from kvcar.cli.app import PANELS

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
def test_without_the_extra_the_command_says_in_one_line_what_to_install(start):
    code = f"import sys; sys.modules['typer'] = None\n{start}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr == "kvcar's command line needs the package typer; install it with: pip install 'kvcar[cli]'\n"
