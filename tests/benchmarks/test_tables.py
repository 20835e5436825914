"""Generated pages and the README's figures are what the records say, and each record says where it comes from."""

import json
import shutil
from pathlib import Path

import figures_block
import frontier_tables
import pages
import pytest
import tables

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results"
RUN = "run: python benchmarks/tables.py"


@pytest.fixture(scope="module")
def made():
    return tables.pages()


def test_every_page_is_what_its_records_say(made):
    folder = ROOT / "docs" / "results"
    assert sorted(made) == sorted(path.name for path in folder.iterdir()), RUN
    for name, page in made.items():
        if not name.endswith(".svg"):  # a plot's bytes depend on the version of matplotlib
            assert (folder / name).read_text(encoding="utf-8") == page, f"{name}: {RUN}"
            assert page.count("\n|") > 2, f"{name} has no record"


def test_the_figures_of_the_readme_are_what_the_records_say():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in tables.BLOCKS:
        assert readme.count(f"<!-- figures: {name} -->") == 1
    assert tables.with_figures(readme) == readme, RUN


def test_a_record_that_changes_changes_the_readme(tmp_path, monkeypatch):
    for path in RESULTS.glob("*.json"):
        shutil.copy(path, tmp_path)
    path = tmp_path / "frontier-fit-balanced-8x.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"codec_bytes": 2 * record["codec_bytes"]}))
    monkeypatch.setattr(pages, "RESULTS", tmp_path)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert tables.with_figures(readme) != readme


def test_codecs_pay_from_where_cache_and_codecs_are_as_large_as_the_full_cache():
    (r,) = pages.load("frontier-wikitext-2-balanced-8x.json")
    megabytes, pays = frontier_tables.codec_cells(r)
    saved = r["full_bytes_per_token"] - r["stored_bytes_per_token"]
    assert abs(int(pays.replace(",", "")) * saved - 1e6 * int(megabytes)) < 1e6
    assert f"| {megabytes} | {pays} |" in figures_block.frontier_block()


def test_every_record_names_its_command_and_versions():
    paths = sorted(RESULTS.glob("*.json"))
    assert paths
    for path in paths:
        record = json.loads(path.read_text(encoding="utf-8"))
        assert "config" in record, path
        assert {"command", "torch", "transformers", "date"} <= record["provenance"].keys(), path
