"""``kvcar compare`` and the benchmark that has rival methods beside it, from end to end on a tiny model in a folder."""

import json

import pytest
import typer
from compare import main as benchmark
from compare_tables import compare_pages
from test_commands import bundle, error_of, model_folder, run, text_file  # noqa: F401 (fixtures)
from typer.testing import CliRunner

import kvcar.evaluate.quantized_caches as quantized
from kvcar.errors import KVCarError

HQQ = "hqq-2bit"


def test_compare_has_every_row_in_table_plot_and_json(bundle, model_folder, text_file, tmp_path):  # noqa: F811
    figures, plot = tmp_path / "figures.json", tmp_path / "plot.svg"
    output = run(
        "compare", model_folder, "-b", bundle, "-b", f"again={bundle}", "--text", text_file, "--context", 200, "--windows", 2,
        "--transformers", f"{HQQ},hqq-4bit", "--side-by-side", 2, "--json", figures, "--plot", plot,
    )  # fmt: skip
    data = json.loads(figures.read_text())
    rows = {row["row"]: row for row in data["rows"]}
    assert list(rows) == ["identity", "tiny-4x", "again", HQQ, "hqq-4bit"]
    assert all(name in output for name in rows)
    assert rows["tiny-4x"]["kl_divergence"] == rows["again"]["kl_divergence"] > rows["identity"]["kl_divergence"]
    assert rows[HQQ]["config"]["residual_tokens"] == 128
    assert rows[HQQ]["tokens"] == 2 * 199
    assert data["config"]["left_out"] == {}
    assert plot.read_text().startswith("<svg")
    assert "kvcar linear, 2 layers" in plot.read_text()


def test_a_row_that_is_not_installed_is_told(model_folder, text_file, monkeypatch):  # noqa: F811
    monkeypatch.setattr(quantized, "is_hqq_available", lambda: False)
    arguments = ["compare", model_folder, "--text", text_file, "--context", 100, "--windows", 1, "--transformers", HQQ]
    from kvcar.cli import app

    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0
    assert f"left out: {HQQ}: hqq is not installed" in result.stderr
    assert HQQ not in result.stdout


def test_rows_that_cannot_be(bundle, model_folder, text_file, tmp_path):  # noqa: F811
    assert "unknown quantised cache" in error_of("compare", model_folder, "--transformers", "int1")
    assert "two rows would be called 'tiny-4x'" in error_of("compare", model_folder, "-b", bundle, "-b", bundle)
    assert "no bundle at" in error_of("compare", model_folder, "-b", f"x={tmp_path / 'nowhere'}")
    assert "longer than the model's 512" in error_of(
        "compare", model_folder, "--text", text_file, "--context", 600, "--transformers", "none"
    )
    assert "choose a folder that exists" in error_of("compare", model_folder, "--plot", tmp_path / "no" / "plot.svg")


def invoke(*arguments):
    app = typer.Typer()
    app.command()(benchmark)
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


ROWS = ["identity", "mine", HQQ, "kivi-2bit", "turboquant-3bit", "palu-50-4bit", "kvtc-8x"]


def test_the_benchmark_writes_a_record_a_row_and_goes_on_where_it_was(bundle, model_folder, text_file, tmp_path):  # noqa: F811
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
