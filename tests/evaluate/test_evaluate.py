"""``kvcar.evaluate``: called by its name, whichever is imported first, and the same figures by every way in."""

import subprocess
import sys

import pytest
from bundles import fitted
from tiny import tiny_model, token_ids

import kvcar
from kvcar.cache.cache import KVCarCache
from kvcar.errors import InputError
from kvcar.evaluate.fidelity import measure_fidelity
from kvcar.text import evaluation_texts, token_windows

CALL = "import kvcar; assert callable(kvcar.evaluate); import inspect; assert 'bundle' in str(inspect.signature(kvcar.evaluate))"
DEEP = "from kvcar.evaluate.fidelity import Fidelity; import kvcar.evaluate.memory; assert Fidelity"


@pytest.mark.parametrize(
    "program", [f"{CALL}; {DEEP}; {CALL}", f"{DEEP}; {CALL}; {DEEP}", "from kvcar import evaluate; evaluate.__call__"]
)
def test_function_and_package_share_a_name(program):
    subprocess.run([sys.executable, "-c", program], check=True)


class Characters:
    """A tokenizer of a character each."""

    bos_token_id = None

    def __call__(self, text, **options):
        return {"input_ids": [3 + ord(letter) % 100 for letter in text]}


def test_a_bundle_is_measured_on_tokens_as_it_is_by_hand():
    model = tiny_model("llama")
    bundle, ids = fitted(model, bits=3), token_ids(150, batch=2)
    found = kvcar.evaluate(model, bundle, token_ids=ids)
    with kvcar.attach(model, bundle):
        by_hand = measure_fidelity(model, ids, {"x": lambda: KVCarCache(bundle)})["x"]
        assert kvcar.evaluate(model, bundle, token_ids=ids) == by_hand == found, "attached or not"
    assert found.codec_bytes >= bundle.codec_bytes > 0
    assert kvcar.evaluate(model, bundle, token_ids=ids, window=0).stored_bytes < found.stored_bytes


def test_texts_files_and_lists(tmp_path):
    model, tokenizer = tiny_model("llama"), Characters()
    bundle = fitted(model, bits=3)
    text = "".join(chr(97 + i * i % 26) for i in range(900))
    path = tmp_path / "a.txt"
    path.write_text(text)
    options = {"context": 100, "windows": 2}
    expected = kvcar.evaluate(model, bundle, token_ids=token_windows(tokenizer, text, 100, 2))
    for given in (text, path, str(path), [text], [path]):
        assert kvcar.evaluate(model, bundle, tokenizer, given, **options) == expected, given
    assert kvcar.evaluate(model, bundle, tokenizer, [text, path], **options).windows == 4
    assert kvcar.evaluate(model, bundle, tokenizer, windows=1).context == 512, "as many as the model has"
    assert evaluation_texts(None)[0].name.endswith("(last part)")


def test_what_excludes_each_other_is_refused():
    model = tiny_model("llama")
    bundle = fitted(model, bits=3)
    for given, message in (
        ({}, "needs a tokenizer"),
        ({"token_ids": token_ids(9), "text": "x"}, "one or the other"),
        ({"tokenizer": Characters(), "text": "abc", "context": 600}, "longer than the model's 512"),
        ({"tokenizer": Characters(), "text": []}, "empty list"),
        ({"tokenizer": Characters(), "text": " "}, "empty text"),
        ({"token_ids": token_ids(9), "window": 5}, "multiple of the page size"),
    ):
        with pytest.raises(InputError, match=message):
            kvcar.evaluate(model, bundle, **given)


@pytest.mark.parametrize("profile", ["fast", "balanced", "small"])
def test_kernels_measure_what_pages_decoded_in_float_do(profile):
    """What users run, in chunks and in steps of few tokens, against float32 over decoded pages."""
    model = tiny_model("llama")
    bundle = kvcar.fit(model, token_ids=token_ids(256, batch=40), times_smaller=5, profile=profile, check=False)
    ids = token_ids(200, batch=2, seed=5)
    plain = kvcar.evaluate(model, bundle, token_ids=ids, keep_decoded=True)
    assert plain.kl_divergence.value > 1e-5
    with kvcar.attach(model, bundle):
        steps = measure_fidelity(model, ids, {"x": lambda: KVCarCache(bundle)}, chunk=8)["x"]
        steps_in_float = measure_fidelity(model, ids, {"x": lambda: KVCarCache(bundle, keep_decoded=True)}, chunk=8)[
            "x"
        ]
    for found, wanted in ((kvcar.evaluate(model, bundle, token_ids=ids), plain), (steps, steps_in_float)):
        assert found.kl_divergence.value == pytest.approx(wanted.kl_divergence.value, rel=0.01)
        # Heads of 16 elements are padded to whole vectors in a copy.
        assert bundle.codec_bytes <= found.codec_bytes < 3 * bundle.codec_bytes
