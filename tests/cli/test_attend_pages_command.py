"""``--attend-pages`` of every command that takes it."""

import json

import pytest
from test_commands import bundle, error_of, model_folder, run, text_file, words  # noqa: F401  # fixtures

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


def test_eval_with_a_number_for_each_layer(bundle, model_folder, text_file, tmp_path):  # noqa: F811
    path = tmp_path / "figures.json"
    output = run(
        "eval", model_folder, "-b", bundle, "--text", text_file, "--context", 400, "--windows", 1, "--attend-pages", "1,2,3,99",
        "--following", 10, "--json", path,
    )  # fmt: skip
    assert "2.8 of 5" in output
    assert json.loads(path.read_text())["attend_pages"] == [1, 2, 3, 99]
    message = error_of("eval", model_folder, "-b", bundle, "--text", text_file, "--attend-pages", "1,2")
    assert "one for each layer; got 2" in message


@pytest.mark.parametrize("command", ["eval", "generate", "size"])
@pytest.mark.parametrize("given", ["0", "4,0,4,4", "few", "4,,4,4"])
def test_no_pages_at_all_are_refused(command, given, bundle, model_folder):  # noqa: F811
    options = ("--prompt", words(4)) if command == "generate" else ()
    message = error_of(command, model_folder, "-b", bundle, "--attend-pages", given, *options)
    assert "--attend-pages takes a number of pages, or one for each layer" in message


def test_a_context_too_short_to_step_its_end_is_refused(bundle, model_folder, text_file):  # noqa: F811
    message = error_of("eval", model_folder, "-b", bundle, "--text", text_file, "--context", 100, "--attend-pages", 2)
    assert f"last {FOLLOWING_TOKENS}" in message


def test_pages_shared_out_are_what_attend_pages_takes(bundle, model_folder, text_file, tmp_path):  # noqa: F811
    path = tmp_path / "pages.json"
    output = run(
        "pages", model_folder, "-b", bundle, "--text", text_file, "--context", 400, "--average", 2, "--following", 10,
        "--json", path,
    )  # fmt: skip
    counts = json.loads(path.read_text())["pages"]
    assert sum(counts) == 2 * 4
    printed = ",".join(map(str, counts))
    assert f"--attend-pages {printed}" in output
    run(
        "generate", model_folder, "-b", bundle, "--prompt", words(400), "--max-new-tokens", 4, "--attend-pages", printed
    )
    message = error_of("pages", model_folder, "-b", bundle, "--text", text_file, "--context", 100, "--average", 9)
    assert "to share out 9 a layer" in message
