"""``kvcar.fit`` and ``kvcar.lossless``: what a user calls."""

import subprocess
import sys
from pathlib import Path

import pytest
from commands import model_folder, text_file, words  # noqa: F401
from tiny import tiny_model, token_ids
from transformers import AutoTokenizer

import kvcar
from kvcar.errors import InputError
from kvcar.evaluate.fidelity import measure_fidelity
from kvcar.models.geometry import geometry_of

MODEL = tiny_model("llama")


@pytest.fixture(scope="module")
def tokenizer(model_folder):  # noqa: F811
    return AutoTokenizer.from_pretrained(model_folder)


def test_a_text_is_all_it_takes(tokenizer, tmp_path):
    text = words(9000)
    bundle = kvcar.fit(MODEL, tokenizer, text, times_smaller=4, effect_tokens=512)
    assert 4 <= bundle.figures["times_smaller"] < 4.4 or bundle.figures["tokens"] < 4096
    assert bundle.figures["codec_bytes"] == bundle.codec_bytes
    assert bundle.figures["held_out"]["kl_divergence"] > 0
    assert bundle.fit.text == "given text (first part) + samples of the model"
    again = kvcar.Bundle.from_pretrained(bundle.save_pretrained(tmp_path / "b"))
    assert again.figures == bundle.figures
    assert again.model.name == "LlamaForCausalLM"


def test_texts_may_be_files_and_several(tokenizer, text_file):  # noqa: F811
    given = {"structure": kvcar.Structure(bits=4), "tokens": 4096}
    path, several = (kvcar.fit(MODEL, tokenizer, t, **given) for t in (str(text_file), [text_file, words(9000)]))
    assert path.fit.text == "words.txt (first part)"
    assert several.fit.text == "words.txt (first part) + given text (first part)"
    assert several.fit.tokens == 4096
    whole = kvcar.fit(MODEL, tokenizer, text_file, check=False, **given)
    assert whole.fit.text == "words.txt"
    assert "held_out" not in whole.figures


def test_token_ids_take_the_place_of_tokenizer_and_text():
    ids = token_ids(256, batch=20, seed=3)
    bundle = kvcar.fit(MODEL, token_ids=ids, structure=kvcar.Structure(bits=4), window=128, seed=5)
    assert bundle.fit.tokens == 18 * 256, "a tenth is held out"
    assert bundle.figures["held_out"]["windows"] == 2
    assert bundle.plan.window == 128
    assert (bundle.fit.seed, bundle.fit.text) == (5, "token ids")


def test_what_does_not_go_together_is_refused():
    with pytest.raises(InputError, match="needs the model's tokenizer"):
        kvcar.fit(MODEL)
    with pytest.raises(InputError, match="not both"):
        kvcar.fit(MODEL, text="a", token_ids=token_ids(64))
    with pytest.raises(InputError, match="not both"):
        kvcar.fit(MODEL, token_ids=token_ids(64), times_smaller=3, max_kl=0.1)


def test_a_lossless_bundle_takes_no_pass_and_costs_nothing(monkeypatch, tmp_path):
    geometry_of(MODEL)  # a model is looked at once
    with monkeypatch.context() as patch:
        patch.setattr(type(MODEL), "forward", lambda *_, **__: pytest.fail("the model was run"))
        bundle = kvcar.lossless(MODEL, name="tiny")
        folder = bundle.save_pretrained(tmp_path / "b")
    assert bundle.plan.exact_dtype == "model"
    assert "Compressed KV cache for tiny" in (folder / "README.md").read_text()
    with kvcar.attach(MODEL, kvcar.Bundle.from_pretrained(folder)):
        caches = {"lossless": lambda: kvcar.KVCarCache(bundle)}
        found = measure_fidelity(MODEL, token_ids(300, batch=1), caches)["lossless"]
    assert found.kl_divergence.value < 1e-6
    assert found.same_top.value == 1


@pytest.mark.parametrize("first", ["kvcar.fit.statistics", "kvcar"])
def test_the_package_is_called_whatever_was_imported_first_and_needs_no_accelerate(first):
    code = f"""
import sys
sys.modules["accelerate"] = None
import {first}
import kvcar, torch
from tiny import tiny_model, token_ids
bundle = kvcar.fit(tiny_model("llama"), token_ids=token_ids(128, batch=4), structure=kvcar.Structure(bits=4))
from kvcar.fit.fit import fit
print(len(bundle.plan.blocks), kvcar.fit.fit.fit is fit)
"""
    tests = str(Path(__file__).parents[1])
    result = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {tests!r})\n{code}"], capture_output=True, text=True, check=False
    )  # fmt: skip
    assert result.stdout.split() == ["8", "True"], result.stderr
