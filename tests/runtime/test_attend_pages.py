"""Attending to a few pages: nothing changes where there are no more, and all that a cache can do keeps working."""

import pytest
import torch
from bundles import by_hand, exact, fitted
from tiny import tiny_model, token_ids

import kvcar
from kvcar.errors import InputError
from kvcar.kernels.allocation import stored_bytes
from kvcar.runtime.cache import KVCarCache
from kvcar.runtime.snapshot import fork_of
from kvcar.runtime.summaries import LONGEST_SELECTING_PASS_TOKENS, PageSummaries
from kvcar.shapes import Slot

PAGE = 32


@pytest.fixture(scope="module")
def llama():
    model = tiny_model("llama")
    return model, fitted(model, bits=4, layers_per_block=2)


@pytest.fixture(scope="module")
def lossless():
    """Keys that decode to what they were, so that summaries do not depend on where they come from."""
    model = tiny_model("llama")
    return model, fitted(model, codec="identity")


def step(model, cache, ids, **inputs):
    with torch.no_grad():
        return model(input_ids=ids, past_key_values=cache, use_cache=True, **inputs).logits


def fill(model, cache, ids, chunk=64):
    return torch.cat([step(model, cache, part) for part in ids.split(chunk, dim=1)], 1)


def summaries_of(cache):
    held = cache._summaries
    return {layer: held._buffers[layer][:, :, :pages] for layer, pages in held._pages.items()}


@pytest.mark.parametrize("window", [0, 32])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3"])
def test_with_no_more_pages_than_that_every_bit_is_the_same(family, window):
    model = tiny_model(family)
    bundle = fitted(model, bits=4)
    with kvcar.attach(model, bundle):
        plain, choosing = KVCarCache(bundle, window), KVCarCache(bundle, window, attend_pages=6)
        for cache in (plain, choosing):
            fill(model, cache, token_ids(150))
        for part in token_ids(40, seed=4).split(3, dim=1):
            assert torch.equal(step(model, choosing, part), step(model, plain, part))
        assert plain.pages == choosing.pages <= 6


def test_fewer_pages_change_the_output_and_more_of_them_less(llama):
    model, bundle = llama
    with kvcar.attach(model, bundle):
        errors = []
        plain = KVCarCache(bundle)
        fill(model, plain, token_ids(400))
        expected = fill(model, fork_of(plain, None), token_ids(20, seed=4), 1)
        for most in (1, 4, 8, plain.pages - 1):
            errors.append((fill(model, fork_of(plain, most), token_ids(20, seed=4), 1) - expected).abs().mean())
    assert errors[0] > errors[1] > errors[2] > errors[3] > 0


def test_a_number_for_every_layer(llama, tmp_path):
    """The same number everywhere is that number; as many as there are pages is all; a layer that gets fewer tells."""
    model, bundle = llama
    ids, more, layers = token_ids(400), token_ids(40, seed=4), model.config.num_hidden_layers
    with kvcar.attach(model, bundle, attend_pages=[3] * layers) as attachment:
        cache = attachment.new_cache()
        fill(model, cache, ids)
        expected = fill(model, fork_of(cache, 3), more, 1)
        assert torch.equal(fill(model, fork_of(cache, cache.attend_pages), more, 1), expected)
        everything = fill(model, fork_of(cache, None), more, 1)
        assert torch.equal(fill(model, fork_of(cache, [99] * layers), more, 1), everything)
        own = [
            fill(model, fork_of(cache, [2 if i == fewer else 99 for i in range(layers)]), more, 1) for fewer in (0, 1)
        ]
        assert not torch.equal(own[0], everything)
        assert not torch.equal(own[0], own[1])
        counts = list(range(1, layers + 1))
        cache = fork_of(cache, counts)
        cache.flush_window()
        cache.save(tmp_path / "a.ctx")
        loaded = KVCarCache.load(tmp_path / "a.ctx", model, attend_pages=counts)
        assert loaded.attend_pages == tuple(counts)
        cache.crop(-25)
        cache.reorder_cache(torch.tensor([0, 0]))
        doubled = fill(model, cache, more.expand(2, -1), 1)
        assert torch.equal(doubled[0], doubled[1])


def test_long_passes_attend_to_everything(llama):
    model, bundle = llama
    ids, longest = token_ids(300), LONGEST_SELECTING_PASS_TOKENS
    with kvcar.attach(model, bundle):
        plain, choosing = KVCarCache(bundle), KVCarCache(bundle, attend_pages=2)
        for cache in (plain, choosing):
            fill(model, cache, ids)
        next_ids = token_ids(longest + 1, seed=4)
        assert torch.equal(step(model, fork_of(choosing, 2), next_ids), step(model, fork_of(plain, None), next_ids))
        next_ids = next_ids[:, :longest]
        assert not torch.equal(step(model, choosing, next_ids), step(model, plain, next_ids))


@pytest.mark.parametrize("window", [0, 32])
def test_lossless_summaries_are_the_same_however_tokens_arrive(lossless, window):
    """Exact where a page's tokens leave together, decoded where not."""
    model, bundle = lossless
    ids = token_ids(205)
    with kvcar.attach(model, bundle):
        found = []
        for chunk in (64, 1, 45):
            cache = KVCarCache(bundle, window, attend_pages=100)
            fill(model, cache, ids, chunk)
            found.append(summaries_of(cache))
            assert {x.shape[2] for x in found[-1].values()} == {(205 - window) // PAGE}
        for other in found[1:]:
            for layer, summary in found[0].items():
                torch.testing.assert_close(other[layer], summary, atol=2e-3, rtol=2e-3)


def test_padding_and_sinks_are_in_no_summary(lossless):
    model, bundle = lossless
    ids, mask = token_ids(150, batch=2), torch.ones(2, 150, dtype=torch.int64)
    mask[1, :70] = 0
    with kvcar.attach(model, bundle):
        cache = KVCarCache(bundle, 0, attend_pages=1)
        step(model, cache, ids, attention_mask=mask)
        coder = cache._host.coder(bundle)
        unit = next(u for u in coder.units if Slot(0, 0, "key") in u.unit.slots)
        keys = cache._pages.contents()[coder.units.index(unit)].raw.float()[..., :16]
    for sequence, first in ((0, 4), (1, 74)):
        for page in range(4):
            own = keys[sequence, max(first, page * PAGE) : (page + 1) * PAGE]
            expected = (own.amin(0) + own.amax(0)) / 2 if len(own) else torch.zeros(16)
            torch.testing.assert_close(
                summaries_of(cache)[0][sequence, 0, page].float(), expected, atol=2e-3, rtol=2e-3
            )


@pytest.mark.parametrize("window", [0, 32])
def test_a_padded_batch_is_its_sequences_alone(lossless, window):
    """Padding of whole pages, so that a sequence's pages are the same alone and in the batch."""
    model, bundle = lossless
    lengths = [300, 300 - PAGE, 300 - 5 * PAGE]
    rows = [token_ids(n, seed=n) for n in lengths]
    padded = torch.cat([torch.nn.functional.pad(row, (300 - row.shape[1], 0)) for row in rows])
    mask = (torch.arange(300) >= 300 - torch.tensor(lengths)[:, None]).long()
    options = {"max_new_tokens": 40, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with kvcar.attach(model, bundle, window=window, attend_pages=3):
        batch = model.generate(padded, attention_mask=mask, **options)
        for index, row in enumerate(rows):
            alone = model.generate(row, **options)
            for a, b in zip(batch.logits, alone.logits, strict=True):
                torch.testing.assert_close(a[index], b[0], atol=1e-3, rtol=1e-3)


def test_beams_and_other_changes_of_the_batch(lossless):
    model, bundle = lossless
    ids, more = token_ids(200, batch=3), token_ids(8, batch=3, seed=4)
    with kvcar.attach(model, bundle):
        for change, picked in (
            (lambda c: c.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
            (lambda c: c.batch_select_indices(torch.tensor([1, 2])), [1, 2]),
            (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        ):
            cache, fresh = KVCarCache(bundle, attend_pages=2), KVCarCache(bundle, attend_pages=2)
            fill(model, cache, ids)
            change(cache)
            fill(model, fresh, ids[picked])
            next_ids = more[:1].expand(len(picked), -1)
            torch.testing.assert_close(fill(model, cache, next_ids, 1), fill(model, fresh, next_ids, 1))


@pytest.mark.parametrize("window", [0, 32])
def test_crop_takes_summaries_back(lossless, window):
    model, bundle = lossless
    ids, other = token_ids(300), token_ids(70, seed=5)
    with kvcar.attach(model, bundle):
        for kept in (290, 250, 101, 7):
            cache, fresh = (KVCarCache(bundle, window, attend_pages=2) for _ in range(2))
            fill(model, cache, ids)
            cache.crop(kept - 300)
            fill(model, fresh, ids[:, :kept])
            a, b = fill(model, cache, other, 5), fill(model, fresh, other, 5)
            if window == 0:  # with a window, its tokens are in pages already after a crop, so other pages are chosen
                torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
            assert torch.isfinite(a).all()
            for layer, summary in summaries_of(cache).items():
                pages = min(summary.shape[2], kept // PAGE)
                torch.testing.assert_close(summary[:, :, :pages], summaries_of(fresh)[layer][:, :, :pages], atol=2e-3, rtol=2e-3)  # fmt: skip


def test_crop_into_a_page_forgets_its_summary(llama):
    model, bundle = llama
    with kvcar.attach(model, bundle):
        cache = KVCarCache(bundle, 0, attend_pages=2)
        fill(model, cache, token_ids(200))
        cache.crop(-20)  # 180 tokens: five pages and 20 tokens
        assert {x.shape[2] for x in summaries_of(cache).values()} == {5}
        step(model, cache, token_ids(12, seed=4))
        assert {x.shape[2] for x in summaries_of(cache).values()} == {6}


def test_reset_forgets_them(llama):
    model, bundle = llama
    with kvcar.attach(model, bundle):
        cache, fresh = KVCarCache(bundle, attend_pages=2), KVCarCache(bundle, attend_pages=2)
        fill(model, cache, token_ids(200))
        cache.reset()
        assert cache.stored_bytes() == 0
        ids = token_ids(160, batch=2)
        assert torch.equal(fill(model, cache, ids, 10), fill(model, fresh, ids, 10))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("window", [0, 32, 64])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_bytes_of_tensors_are_the_arithmetic(family, window, batch):
    model = tiny_model(family)
    bundle = fitted(model, bits=3)
    for chunk, tokens in ((64, 20), (64, 96), (64, 350), (1, 100)):
        with kvcar.attach(model, bundle):  # anew: tables of angles are as long as the longest sequence needs
            cache = KVCarCache(bundle, window, attend_pages=3)
            fill(model, cache, token_ids(tokens, batch=batch), chunk)
        parts = cache.stored_bytes_by_part()
        assert (parts["summaries"] > 0) == ((tokens - window) // PAGE > 0)
        assert sum(parts.values()) == stored_bytes(cache.plan, tokens, 4, batch, summaries=True)
    if family == "llama":
        cache.crop(-20)
        assert parts["summaries"] == cache.stored_bytes_by_part()["summaries"], "room for 8 pages either way"
    plain = KVCarCache(bundle, window)
    assert plain.stored_bytes_by_part()["summaries"] == 0


@pytest.mark.parametrize("keep_window", [False, True], ids=["coded window", "kept window"])
def test_a_loaded_cache_chooses_as_the_saved_one(lossless, keep_window, tmp_path):
    model, bundle = lossless
    more = token_ids(80, seed=4)
    with kvcar.attach(model, bundle):
        cache = KVCarCache(bundle, attend_pages=2)
        fill(model, cache, token_ids(250))
        cache.save(tmp_path / "a.ctx", keep_window=keep_window)
        loaded = KVCarCache.load(tmp_path / "a.ctx", model, attend_pages=2)
        if not keep_window:
            cache.flush_window()
        assert loaded.attend_pages == 2
        torch.testing.assert_close(fill(model, loaded, more, 1), fill(model, cache, more, 1), atol=1e-3, rtol=1e-3)
        for layer, summary in summaries_of(cache).items():
            torch.testing.assert_close(summaries_of(loaded)[layer], summary, atol=2e-3, rtol=2e-3)
        assert KVCarCache.load(tmp_path / "a.ctx", model).attend_pages is None


@pytest.mark.parametrize("window", [0, 64])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_keeping_decoded_pages_chooses_the_same(family, window):
    model = tiny_model(family)
    bundle = fitted(model, bits=6)
    ids, mask = token_ids(300, batch=2), torch.ones(2, 300, dtype=torch.int64)
    mask[1, :70] = 0
    outputs = []
    with kvcar.attach(model, bundle):
        for kept in (False, True):
            cache = KVCarCache(bundle, window, keep_decoded=kept, attend_pages=3)
            step(model, cache, ids[:, :250], attention_mask=mask[:, :250])
            own = [step(model, cache, ids[:, i : i + 2], attention_mask=mask[:, : i + 2]) for i in range(250, 270, 2)]
            outputs.append(torch.cat(own, 1))
    torch.testing.assert_close(*outputs, atol=2e-3, rtol=1e-3)


def test_a_fork_leaves_the_cache_as_it_was(llama):
    model, bundle = llama
    with kvcar.attach(model, bundle):
        cache = KVCarCache(bundle, attend_pages=2)
        fill(model, cache, token_ids(200))
        before = {layer: summary.clone() for layer, summary in summaries_of(cache).items()}
        expected = fill(model, fork_of(cache, 2), token_ids(100, seed=4), 7)
        assert cache.get_seq_length() == 200
        assert all(torch.equal(summary, before[layer]) for layer, summary in summaries_of(cache).items())
        assert torch.equal(fill(model, cache, token_ids(100, seed=4), 7), expected)


def test_generate_over_structures_a_plan_can_have():
    model = tiny_model("llama")
    blocks = [tuple(Slot(i, h, "key") for i in (0, 1) for h in (0, 1)), (Slot(3, 1, "value"),)]
    for bundle in (by_hand(model, blocks, bits=[16, 7, 3, 1]), exact(model), fitted(model, bits=3, sinks=0)):
        with kvcar.attach(model, bundle, attend_pages=2) as attachment:
            cache = attachment.new_cache()
            out = model.generate(token_ids(200), past_key_values=cache, max_new_tokens=5, do_sample=False)
            assert out.shape == (1, 205)
            assert cache.stored_bytes() == stored_bytes(cache.plan, 204, 4, summaries=True)


@pytest.mark.parametrize("most", [0, -3])
def test_fewer_pages_than_one_are_refused(llama, most):
    model, bundle = llama
    with pytest.raises(InputError, match="at least 1 page"):
        KVCarCache(bundle, attend_pages=most)
    with pytest.raises(InputError, match="at least 1 page"):
        kvcar.attach(model, bundle, attend_pages=most)
    layers = model.config.num_hidden_layers
    with pytest.raises(InputError, match="at least 1 page"):
        KVCarCache(bundle, attend_pages=[4] * (layers - 1) + [most])
    with pytest.raises(InputError, match=f"one number or {layers}"):
        KVCarCache(bundle, attend_pages=[4] * (layers + 1))


def test_a_short_page_is_added_to_no_summary():
    """Exact keys that do not begin a page are left for later."""
    summaries = PageSummaries(2, PAGE)
    summaries.add(0, torch.ones(1, 2, 40, 16), 16, torch.tensor([0]))
    summaries.add(0, torch.ones(1, 2, 31, 16), 0, torch.tensor([0]))
    assert summaries.nbytes == 0
    summaries.add(0, torch.ones(1, 2, 70, 16), 0, torch.tensor([0]))
    assert summaries_of_layer(summaries) == 2


def summaries_of_layer(summaries):
    return summaries._pages[0]
