"""The profile for stored contexts: codes whose entropy is what was asked for."""

import pytest
import torch
from bundles import SOURCE
from tiny import tiny_model, token_ids

import kvcar
from kvcar.cache.cache import KVCarCache
from kvcar.context.entropy import entropy_bits_per_token
from kvcar.errors import FitError
from kvcar.fit.capture import capture
from kvcar.fit.fit import fit_bundles
from kvcar.fit.options import FitOptions
from kvcar.plan import CacheConfig

WINDOWS = token_ids(256, batch=10, seed=3)


def found(model, size):
    options = FitOptions(size, profile="stored", cache=CacheConfig(32, 4, 32), effect_tokens=512)
    return next(fit_bundles(model, WINDOWS, [options], SOURCE, "tiny"))


@pytest.mark.parametrize("size", [5.0, 12.0])
def test_codes_have_the_entropy_that_was_asked_for(size):
    model = tiny_model("llama")
    bundle = found(model, size)
    geometry, bits = bundle.plan.geometry, 0.0
    codes = [[] for _ in bundle.blocks]

    def take(index, x):
        coded = bundle.blocks[index]
        codes[index].append(coded.quantizer.codes(coded.codec.encode(x)).long())

    blocks = [block.slots for block in bundle.plan.blocks]
    for _ in capture(model, geometry, WINDOWS[:-2], blocks, 4, take):
        pass
    bits = sum(entropy_bits_per_token(torch.cat(each)) for each in codes)
    full = geometry.full_bytes(1) * 8
    assert full / bits == pytest.approx(size, rel=0.12)


def test_more_is_lost_at_larger_sizes_and_the_cache_runs():
    model = tiny_model("llama")
    near, far = found(model, 5.0), found(model, 12.0)
    assert 0 < near.figures["two_pass_kl"] < far.figures["two_pass_kl"]
    with kvcar.attach(model, far), torch.no_grad():
        cache = KVCarCache(far, 0)
        for part in token_ids(100).split(40, 1):
            logits = model(input_ids=part, past_key_values=cache, use_cache=True).logits
    assert torch.isfinite(logits).all()


def test_sinks_alone_may_be_too_much():
    with pytest.raises(FitError, match="out of reach"):
        found(tiny_model("llama"), 2000.0)
