"""What can drift is checked: documented commands and code, pictures, links between documents."""

import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from commands import WORDS
from tiny import tiny_model
from transformers import AutoTokenizer

import kvcar
from kvcar.cli import app
from kvcar.models.load import LoadedModel

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(text, language):
    """Code blocks of a document in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text.replace("\\\n", " "), re.MULTILINE | re.DOTALL)


def all_commands():
    """Every command by its words, with the options that it knows."""
    root = typer.main.get_command(app)

    def below(command, names):
        yield names, {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        for name, inner in getattr(command, "commands", {}).items():
            yield from below(inner, (*names, name))

    return dict(below(root, ()))


def documented_commands():
    lines = [
        line
        for page in DOCUMENTS
        for block in blocks(page.read_text(encoding="utf-8"), "sh")
        for line in block.splitlines()
    ]
    pieces = [piece.strip() for line in lines for piece in line.split("&&")]
    return sorted({piece for piece in pieces if re.match(r"(\S*/)?kvcar ", piece)})


@pytest.mark.parametrize("line", documented_commands())
def test_documented_commands_and_their_options_exist(line):
    given = shlex.split(line, comments=True)[1:]
    known = all_commands()
    names = next(tuple(given[:n]) for n in (2, 1) if tuple(given[:n]) in known)
    options = {word.split("=")[0] for word in given if re.match(r"--?[a-z]", word)}
    assert options <= known[names] | {"--help"}, f"kvcar {' '.join(names)} has no {options - known[names]}"


def test_the_readme_mentions_every_command():
    for names in all_commands():
        if names and names != ("paper",):
            assert re.search(rf"kvcar {' '.join(names)}\b", README), f"kvcar {' '.join(names)}"


class Letters:
    """A tokenizer that knows the words of the tests and takes any text."""

    def __init__(self, folder):
        self._own = AutoTokenizer.from_pretrained(folder)

    def __call__(self, text, **options):
        return self._own(" ".join(WORDS[3 + ord(c) % 120] for c in text), **options)

    def __getattr__(self, name):
        return getattr(self._own, name)


def test_the_readmes_python_runs(model_folder, tmp_path, monkeypatch, capsys):
    loaded = LoadedModel(tiny_model("llama"), Letters(model_folder), "demo")
    monkeypatch.setattr(kvcar, "load_model", lambda name: loaded, raising=False)
    monkeypatch.chdir(tmp_path)
    names = {"kvcar": kvcar}
    for block in blocks(README, "python"):
        exec(compile(block, "README.md", "exec"), names)
    assert "perplexity" in capsys.readouterr().out
    assert names["bundle"].figures["times_smaller"] > 1
    assert (tmp_path / "demo-8x" / "README.md").exists()
    assert names["cache"].tokens > 50


@pytest.mark.parametrize("script", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_examples_run(script, model_folder, text_file, tmp_path):
    arguments = [str(model_folder), "--text", str(text_file)]
    if script.stem == "measure":
        arguments += ["--sizes", "4", "--context", "256"]
    result = subprocess.run([sys.executable, script, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert re.search("times smaller|times larger|in the file", result.stdout)  # of a tiny model a page may cost much
    assert list(tmp_path.iterdir()) == [], "examples leave nothing behind"


def test_the_gate_runs_the_readmes_test_command():
    gate = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    (command,) = [line for block in blocks(README, "sh") for line in block.splitlines() if "pytest" in line]
    _, install, test = command.split(" && ")
    assert install.split("pip install ")[1] in gate
    assert test.split("/bin/")[1] in gate.replace('"', "")


def test_pictures_are_what_their_script_draws():
    drawn = runpy.run_path(str(ROOT / "docs" / "drawings.py"))["PICTURES"]
    images = ROOT / "docs" / "images"
    assert sorted(path.stem for path in images.iterdir()) == sorted(drawn)
    for name, draw in drawn.items():
        assert (images / f"{name}.svg").read_text(encoding="utf-8") == draw(), "run: python docs/drawings.py"


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_between_documents_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_files_that_contributing_names_exist():
    named = re.findall(r"`((?:[\w.-]+/)+[\w.-]*)`", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert len(named) > 10
    not_yet = {"src/kvcar/serve/", "docs/_build/index.html"}  # the first engine makes one, the build the other
    for name in {name for name in named if not re.search("[A-Z]", name)} - not_yet:
        assert (ROOT / name).exists() or (ROOT / "src" / "kvcar" / name).exists(), name


def test_every_page_of_the_site_is_in_its_table_of_contents():
    listed = set(re.findall(r"^[\w/-]+$", (ROOT / "docs" / "index.md").read_text(encoding="utf-8"), re.MULTILINE))
    pages = {str(path.relative_to(ROOT / "docs").with_suffix("")) for path in (ROOT / "docs").rglob("*.md")}
    assert pages - {"index"} <= listed


def table_of(page, first_row):
    """Names in the first column of the table whose first row is about ``first_row``, in order."""
    rows = page[page.index(f"| `{first_row}` |") :].split("\n\n")[0]
    return re.findall(r"^\| `(\w+)` \|", rows, re.MULTILINE)


def test_the_format_lists_the_fields_that_are_written(tmp_path):
    kvcar.lossless(tiny_model("llama")).save_pretrained(tmp_path / "bundle")
    written = json.loads((tmp_path / "bundle" / "plan.json").read_text())
    page = (ROOT / "docs" / "format.md").read_text(encoding="utf-8")
    assert sorted(table_of(page, "format_version")) == sorted(written)
    plan = page[page.index("The plan is strict") :]
    assert sorted(table_of(plan, "format_version")) == sorted(written["plan"])
    assert page.count(f"| `format_version` | {written['format_version']} |") == 2
