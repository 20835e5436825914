"""Every cache side by side, rival methods too, from end to end on a tiny model in a folder."""

import json

import pytest
import typer
from compare import main as benchmark
from compare_tables import compare_pages
from contenders import named_bundles
from typer.testing import CliRunner

from kvcar.errors import KVCarError

HQQ = "hqq-2bit"


def invoke(*arguments):
    app = typer.Typer()
    app.command()(benchmark)
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


ROWS = ["identity", "mine", HQQ, "kivi-2bit", "turboquant-3bit", "palu-50-4bit", "kvtc-8x"]


def test_the_benchmark_writes_a_record_a_row_and_goes_on_where_it_was(bundle, model_folder, text_file, tmp_path):
    common = [
        text_file,
        "--fit-text",
        text_file,
        "-b",
        f"mine={bundle}",
        "--model",
        model_folder,
        "--context",
        200,
        "--windows",
        1,
    ]
    common += ["--results", tmp_path, "--side-by-side", 3]
    for row in ROWS[:3]:
        common += ["--only", row]
    invoke(*common)
    first = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert len(first) == 3
    for row in ROWS[3:]:
        common += ["--only", row]
    invoke(*common)
    name = f"compare-{text_file.parent.name}-words"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"{name}-{row}.json" for row in ROWS)
    assert all((tmp_path / each).read_text() == text for each, text in first.items()), "rows that are there stay"
    record = json.loads((tmp_path / f"{name}-kivi-2bit.json").read_text())
    assert record["kind"] == "compare"
    assert record["config"]["method"]["bits"] == 2
    with pytest.raises(KVCarError, match="no row is called nonsense"):
        invoke(*common, "--only", "nonsense")
    _check_pages(tmp_path, name)


def _check_pages(folder, name):
    pages = compare_pages(folder)
    assert sorted(pages) == [f"{name}.svg", "compare.md"]
    page = pages["compare.md"]
    assert page.count("\n| `") == len(ROWS)
    for row in ROWS:
        assert f"| `{row}` |" in page
    assert f"]({name}.svg)" in page
    assert "KIVI" in pages[f"{name}.svg"]
    assert compare_pages(folder / "nothing") == {}
    path = folder / f"{name}-kivi-2bit.json"
    other = json.loads(path.read_text())
    other["config"]["text_sha256"] = "another text"
    path.write_text(json.dumps(other))
    with pytest.raises(KVCarError, match="not measured alike"):
        compare_pages(folder)


def test_bundles_are_named(bundle, tmp_path):
    assert list(named_bundles([str(bundle), f"again={bundle}"])) == ["tiny-4x", "again"]
    with pytest.raises(KVCarError, match="two rows would be called 'tiny-4x'"):
        named_bundles([str(bundle), str(bundle)])
    with pytest.raises(KVCarError, match="no bundle at"):
        named_bundles([f"x={tmp_path / 'nowhere'}"])
