"""``--attend-pages`` of every command that takes it."""

import json

import pytest
from test_commands import bundle, error_of, model_folder, run, text_file, words  # noqa: F401  # fixtures
from typer.testing import CliRunner

from kvcar.cli import app
from kvcar.evaluate.attended import FOLLOWING_TOKENS


def test_generate_with_few_pages(bundle, model_folder, tmp_path):  # noqa: F811
    path, texts, sizes = tmp_path / "out.json", [], []
    for options in ((), ("--attend-pages", 100), ("--attend-pages", 1)):
        run("generate", model_folder, "-b", bundle, "--prompt", words(400), "--max-new-tokens", 12, "--json", path, *options)  # fmt: skip
        data = json.loads(path.read_text())
        texts.append(data["text"])
        sizes.append(data["stored_bytes"])
    assert data["config"]["attend_pages"] == 1
    assert texts[0] == texts[1]
    assert sizes[0] < sizes[1] == sizes[2], "summaries are counted"


def test_eval_steps_token_by_token_with_and_without(bundle, model_folder, text_file, tmp_path):  # noqa: F811
    path = tmp_path / "figures.json"
    output = run(
        "eval", model_folder, "-b", bundle, "--text", text_file, "--context", 400, "--windows", 2, "--attend-pages", 2,
        "--following", 10, "--json", path,
    )  # fmt: skip
    assert "all 5" in output
    assert "2 of 5" in output
    data = json.loads(path.read_text())
    assert data["kind"] == "attend-pages"
    assert data["attend_pages"] == 2
    assert data["kl_divergence_from_all"] > 0
    assert data["following"] == 10


def test_size_counts_summaries(bundle, model_folder, tmp_path):  # noqa: F811
    path, sizes = tmp_path / "size.json", []
    for options in ((), ("--attend-pages", 4)):
        run("size", model_folder, "-b", bundle, "--tokens", 400, "--json", path, *options)
        sizes.append(json.loads(path.read_text())["compressed"]["bytes"])
    # Room for 8 pages of one vector for each of 4 layers' 2 KV heads.
    assert sizes[1] - sizes[0] == 8 * 4 * 2 * 16 * 2


@pytest.mark.parametrize("command", ["eval", "generate", "size"])
def test_no_pages_at_all_are_refused(command, bundle, model_folder):  # noqa: F811
    result = CliRunner().invoke(app, [command, str(model_folder), "-b", str(bundle), "--attend-pages", "0"])
    assert result.exit_code == 2
    assert "attend-pages" in result.output


def test_a_context_too_short_to_step_its_end_is_refused(bundle, model_folder, text_file):  # noqa: F811
    message = error_of("eval", model_folder, "-b", bundle, "--text", text_file, "--context", 100, "--attend-pages", 2)
    assert f"last {FOLLOWING_TOKENS}" in message
