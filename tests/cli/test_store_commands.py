"""``kvcar save`` and going on from what it stored."""

import json

import pytest
import torch
from commands import error_of, run, words
from tiny import token_ids

import kvcar
from kvcar.cache.cache import KVCarCache
from kvcar.context import read_context


@pytest.fixture
def stored(bundle, model_folder, tmp_path):
    text, path, figures = tmp_path / "manual.txt", tmp_path / "manual.ctx", tmp_path / "saved.json"
    text.write_text(words(300, seed=9))
    output = run("save", model_folder, "-b", bundle, "--text", text, "-o", path, "--tokens", 200, "--json", figures)
    assert "200 tokens read" in output
    return path, json.loads(figures.read_text())


def test_a_text_is_stored_and_continued(stored, bundle, model_folder, tmp_path):
    path, saved = stored
    assert saved["file_bytes"] == path.stat().st_size
    assert saved["times_smaller"] == pytest.approx(200 * 512 / saved["file_bytes"])
    context = read_context(path)
    assert context.token_ids.shape == (1, 200)
    figures = tmp_path / "out.json"
    run("generate", model_folder, "-b", bundle, "--context", path, "--prompt", words(20), "--max-new-tokens", 9,
        "--json", figures)  # fmt: skip
    data = json.loads(figures.read_text())
    assert data["context_tokens"] == 200
    assert data["prompt_tokens"] == 20
    assert data["new_tokens"] == 9
    assert data["cache_tokens"] == 228
    # The same through the library.
    loaded = kvcar.load_model(str(model_folder))
    ids = loaded.tokenizer(words(20), return_tensors="pt")["input_ids"]
    with kvcar.attach(loaded.model, bundle):
        cache = KVCarCache.load(path, loaded.model)
        whole = loaded.model.generate(
            torch.cat([context.token_ids, ids], 1), past_key_values=cache, max_new_tokens=9, do_sample=False
        )
    assert data["text"] == loaded.tokenizer.decode(whole[0, 220:], skip_special_tokens=True)


def test_options_of_what_is_stored(bundle, model_folder, tmp_path):
    text, sizes = tmp_path / "t.txt", []
    text.write_text(words(100))
    for options in (["--keep-window"], ["--no-token-ids"]):
        run("save", model_folder, "-b", bundle, "--text", text, "-o", tmp_path / "c", "--force", *options)
        context = read_context(tmp_path / "c")
        sizes.append(context.stored_bytes)
        assert (context.token_ids is None) == ("--no-token-ids" in options)
    assert sizes[0] > sizes[1]


def test_what_does_not_fit_is_told(stored, bundle, model_folder, tmp_path):
    path, _ = stored
    text, short = tmp_path / "long.txt", tmp_path / "short.txt"
    text.write_text(words(600))
    short.write_text(words(5))
    save = ["save", model_folder, "-b", bundle, "--text"]
    assert "--tokens" in error_of(*save, text, "-o", tmp_path / "c")
    assert "has 5 tokens" in error_of(*save, short, "-o", tmp_path / "c", "--tokens", 6)
    assert "--force" in error_of(*save, short, "-o", path)
    assert "multiple of the page size" in error_of(*save, short, "-o", tmp_path / "c", "--window", 33)
    assert "choose a folder" in error_of(*save, short, "-o", tmp_path / "no" / "c")
    assert not (tmp_path / "c").exists()
    go_on = ["generate", model_folder, "-b", bundle, "--context"]
    assert "chat template" in error_of(*go_on, path, "--prompt", "w1", "--chat")
    assert "cannot read the context" in error_of(*go_on, tmp_path / "none", "--prompt", "w1")
    assert "512 positions" in error_of(*go_on, path, "--prompt", words(300), "--max-new-tokens", 20)
    path.write_bytes(path.read_bytes()[:-5])
    assert "truncated" in error_of(*go_on, path, "--prompt", "w1")


def test_several_sequences_cannot_be_continued_by_one_prompt(bundle, model_folder, tmp_path):
    model = kvcar.load_model(str(model_folder)).model
    with kvcar.attach(model, bundle):
        cache = KVCarCache(bundle)
        model(token_ids(40, batch=2), past_key_values=cache)
        cache.save(tmp_path / "c")
    assert "holds 2 sequences" in error_of(
        "generate", model_folder, "-b", bundle, "--context", tmp_path / "c", "--prompt", "w1"
    )
