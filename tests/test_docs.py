"""What can drift is checked: generated tables, the README's figures' records, documented commands."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

from kvcar.cli import app

ROOT = Path(__file__).parent.parent


def load_tables():
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(ROOT / "benchmarks"))
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["fidelity.md", "memory.md", "paper.md", "frontier.md", "gpu-instructions.md"])
def test_tables_are_what_the_records_say(name):
    page = (ROOT / "docs" / "results" / name).read_text(encoding="utf-8")
    assert page == load_tables().PAGES[name](), "run: python benchmarks/tables.py"
    assert page.count("\n|") > 2, "there is at least one record"


def test_attending_to_a_few_pages_is_what_its_records_say():
    page = (ROOT / "docs" / "results" / "attend-pages.md").read_text(encoding="utf-8")
    assert page == load_tables().PAGES["attend-pages.md"](), "run: python benchmarks/tables.py"


def test_the_comparison_is_what_its_records_say():
    load_tables()  # so that its neighbours can be imported
    from compare_tables import compare_pages

    pages, folder = compare_pages(), ROOT / "docs" / "results"
    assert sorted(pages) == sorted(path.name for path in folder.glob("compare*")), "run: python benchmarks/tables.py"
    if pages:
        assert (folder / "compare.md").read_text(encoding="utf-8") == pages["compare.md"]


def test_the_page_of_speed_is_what_its_records_say():
    load_tables()
    from decode_tables import decode_pages

    pages, folder = decode_pages(), ROOT / "docs" / "results"
    assert sorted(pages) == sorted(path.name for path in folder.glob("decode*")), "run: python benchmarks/tables.py"
    for name, page in pages.items():
        assert (folder / name).read_text(encoding="utf-8") == page, "run: python benchmarks/tables.py"


def test_every_record_names_its_command_and_versions():
    paths = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    assert paths
    for path in paths:
        text = path.read_text(encoding="utf-8")
        for field in ('"command"', '"torch"', '"transformers"', '"date"', '"config"'):
            assert field in text, path


def test_the_readme_mentions_every_command():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for command in app.registered_commands:
        name = command.name or command.callback.__name__
        assert re.search(rf"kvcar {name}\b", readme), name


def test_links_between_documents_lead_somewhere():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
