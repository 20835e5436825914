"""One sequence of NaN or infinity neither breaks its batch nor its cache, and is never answered as if nothing was."""

import pytest
import torch
from bundles import fitted
from tiny import tiny_model, token_ids

import kvcar
from kvcar.cache.cache import KVCarCache
from kvcar.errors import CacheStateError

BAD = 1


@pytest.fixture(scope="module")
def llama():
    model = tiny_model("llama")
    return model, fitted(model, times_smaller=3)


def embeddings(model, tokens, seed, bad=None):
    with torch.no_grad():
        found = model.get_input_embeddings()(token_ids(tokens, 3, seed)).clone()
    if bad is not None:
        found[BAD, tokens // 2] = bad
    return found


def passes(model, cache, bad=None, lengths=(50, 1, 1, 60, 1, 40, 1, 70, 1)):
    """Logits of all passes, the second of which brings what is bad."""
    with torch.no_grad():
        return torch.cat(
            [
                model(inputs_embeds=embeddings(model, count, i, bad if i == 1 else None), past_key_values=cache).logits
                for i, count in enumerate(lengths)
            ],
            dim=1,
        )


@pytest.mark.parametrize("backend", ["cpu", "torch", "naive"])
@pytest.mark.parametrize("window", [None, 0], ids=["window", "no window"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=["NaN", "infinity"])
def test_the_other_sequences_go_on_and_the_bad_one_is_nan(llama, backend, window, bad, caplog, monkeypatch):
    model, bundle = llama
    monkeypatch.setenv("KVCAR_KERNELS", backend)
    with kvcar.attach(model, bundle):
        good = passes(model, KVCarCache(bundle, window))
        cache = KVCarCache(bundle, window)
        got = passes(model, cache, bad)
    others = [row for row in range(3) if row != BAD]
    assert torch.equal(got[others], good[others])
    assert torch.equal(got[BAD, :50], good[BAD, :50])
    assert got[BAD, 50:].isnan().all()
    assert cache.paged_tokens > 100
    assert sum("sequences [1] of a batch of 3" in record.getMessage() for record in caplog.records) == 1


def test_what_is_lost_moves_with_its_sequence_and_goes_with_its_tokens(llama):
    model, bundle = llama
    step = token_ids(1, 3, 5)
    with kvcar.attach(model, bundle), torch.no_grad():
        good, cache = KVCarCache(bundle), KVCarCache(bundle)
        passes(model, good), passes(model, cache, torch.nan)
        swapped, cropped, others = cache.fork(), cache.fork(), cache.fork()
        swapped.reorder_cache(torch.tensor([1, 0, 0]))
        lost = model(step, past_key_values=swapped).logits.isnan().flatten(1).all(1)
        assert lost.tolist() == [True, False, False]
        others.batch_select_indices(torch.tensor([0, 2]))
        assert model(step[:2], past_key_values=others).logits.isfinite().all()
        cropped.crop(-(cropped.tokens - 40))
        good.crop(-(good.tokens - 40))
        assert torch.equal(model(step, past_key_values=cropped).logits, model(step, past_key_values=good).logits)


def test_a_batch_of_nothing_else_is_refused_with_its_cache_as_it_was(llama):
    model, bundle = llama
    with kvcar.attach(model, bundle), torch.no_grad():
        cache = KVCarCache(bundle)
        passes(model, cache, torch.nan, (50, 1))
        cache.batch_select_indices(torch.tensor([BAD]))
        with pytest.raises(CacheStateError, match="NaN or infinity"):
            model(token_ids(60, 1), past_key_values=cache)
        assert cache.tokens == 51


def test_flushing_the_window_loses_no_more_than_the_bad_sequence(llama):
    model, bundle = llama
    with kvcar.attach(model, bundle), torch.no_grad():
        cache = KVCarCache(bundle)
        passes(model, cache, torch.nan, (50, 1))
        cache.flush_window()
        lost = model(token_ids(1, 3, 5), past_key_values=cache).logits.isnan().flatten(1).all(1)
    assert lost.tolist() == [False, True, False]
