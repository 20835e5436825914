"""One cache, every backend: what the model says does not depend on which kernels ran."""

from dataclasses import replace

import pytest
import torch
from bundles import fitted
from tiny import tiny_model, token_ids

import kvcar
from kvcar.cache.cache import KVCarCache
from kvcar.kernels.encode import ENCODING
from kvcar.kernels.native import find_compiler

pytest.importorskip("triton", reason="Triton exists for Linux alone")


def step(model, cache, ids):
    with torch.no_grad():
        return model(input_ids=ids, past_key_values=cache, use_cache=True).logits


@pytest.mark.parametrize("backend", ["triton", "cpu"])
def test_steps_with_compiled_kernels_are_pytorchs(backend, monkeypatch):
    if backend == "cpu" and not find_compiler():
        pytest.skip("needs a C compiler")
    model = tiny_model("llama")
    bundle = fitted(model, times_smaller=4, layers_per_block=2)
    ids, following = token_ids(200, batch=2), token_ids(3, seed=5, batch=2)

    def logits():
        cache = KVCarCache(bundle)
        step(model, cache, ids)
        return [step(model, cache, following[:, i : i + 1]) for i in range(3)], cache._pages.arenas

    with kvcar.attach(model, bundle):
        monkeypatch.setenv("KVCAR_KERNELS", "torch")
        expected, pages = logits()
        monkeypatch.setenv("KVCAR_KERNELS", backend)
        encoded = _count_calls(monkeypatch) if backend == "triton" else [1]
        got, own_pages = logits()
    assert encoded, "the encoding kernel was not used"
    for own, torchs in zip(own_pages, pages, strict=True):
        assert (own != torchs).float().mean() < 1e-3  # a latent on the edge between two codes may fall either way
    torch.testing.assert_close(torch.cat(got, 1), torch.cat(expected, 1), atol=2e-2, rtol=2e-2)


def _count_calls(monkeypatch):
    calls, own = [], ENCODING.find("triton")
    counted = replace(own, run=lambda *given: calls.append(1) or own.run(*given))
    monkeypatch.setitem(ENCODING.implementations, ("triton", "any"), counted)
    return calls
