"""Keeping decoded pages changes no number, only who pays for them."""

import pytest
import torch
from bundles import fitted
from tiny import FAMILIES, tiny_model, token_ids

import kvcar
from kvcar.cache.cache import KVCarCache


def run(model, cache, ids, chunk, **inputs):
    with torch.no_grad():
        parts = [
            model(input_ids=part, past_key_values=cache, use_cache=True, **inputs).logits
            for part in ids.split(chunk, 1)
        ]
    return torch.cat(parts, 1)


def both(bundle, window):
    return [KVCarCache(bundle, window, keep_decoded=kept) for kept in (False, True)]


@pytest.mark.parametrize("window", [0, 64])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_decoding_at_each_step(family, window):
    model = tiny_model(family)
    bundle = fitted(model, bits=8, layers_per_block=2)
    with kvcar.attach(model, bundle):
        plain, kept = (run(model, cache, token_ids(230), 37) for cache in both(bundle, window))
    difference = (plain - kept).abs()
    assert difference[:, : 2 * 37].max() < 1e-4, "what is read from the first chunk's pages, whose codes are the same"
    # Later on, sums in another order may round a latent to its neighbouring code, which all tokens after it see.
    assert difference.mean() < 0.01 * plain.std()


def test_lossless_and_mixed_bundles_too():
    model = tiny_model("llama")
    for bundle in (fitted(model, codec="identity"), fitted(model, bits=4, layers=(1, 2))):
        with kvcar.attach(model, bundle):
            plain, kept = (run(model, cache, token_ids(200), 50) for cache in both(bundle, 0))
        torch.testing.assert_close(plain, kept, atol=2e-4, rtol=1e-3)


def test_padding_crop_and_beams():
    model = tiny_model("llama")
    bundle = fitted(model, bits=3)
    ids = token_ids(2 * 150).view(2, 150)
    mask = torch.ones(2, 150, dtype=torch.int64)
    mask[0, :70] = 0
    outputs = []
    with kvcar.attach(model, bundle):
        for cache in both(bundle, 0):
            with torch.no_grad():
                model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
            cache.crop(-20)
            cache.reorder_cache(torch.tensor([1, 0]))
            longer = torch.cat([mask[[1, 0]][:, :-20], torch.ones(2, 30, dtype=torch.int64)], 1)
            with torch.no_grad():
                again = model(input_ids=ids[:, :30], attention_mask=longer, past_key_values=cache, use_cache=True)
            outputs.append(again.logits)
    torch.testing.assert_close(*outputs, atol=2e-4, rtol=1e-3)


def test_bytes_are_those_of_the_compressed_cache():
    model = tiny_model("llama")
    bundle = fitted(model, bits=3)
    with kvcar.attach(model, bundle):
        plain, kept = both(bundle, 64)
        for cache in (plain, kept):
            run(model, cache, token_ids(200), 64)
    assert plain.stored_bytes() == kept.stored_bytes()


def test_it_starts_anew_after_a_reset():
    model = tiny_model("llama")
    bundle = fitted(model, bits=3)
    with kvcar.attach(model, bundle):
        cache = KVCarCache(bundle, 0, keep_decoded=True)
        run(model, cache, token_ids(100), 50)
        cache.reset()
        again = run(model, cache, token_ids(90, seed=5), 50)
        fresh = run(model, KVCarCache(bundle, 0), token_ids(90, seed=5), 50)
    torch.testing.assert_close(again, fresh, atol=2e-4, rtol=1e-3)
