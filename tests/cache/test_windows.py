"""Layers that attend to a window of 512 tokens or more: coded, right while the window slides, and freed behind it."""

import pytest
import torch
from bundles import by_hand
from tiny import tiny_model, token_ids
from tiny_families import tiny_family
from transformers import DynamicCache

import kvcar
from kvcar.cache.cache import KVCarCache
from kvcar.errors import CacheStateError, PlanError, UnsupportedModelError
from kvcar.geometry import Slot
from kvcar.kernels.attend.naive import attend as attend_naively
from kvcar.kernels.attend.tiled import attend as attend_in_tiles
from kvcar.models.geometry import geometry_of
from kvcar.plan import Block, CacheConfig, Plan

WINDOW = 512
# Far past the window, in chunks, a few tokens and steps.
CHUNKS = (200, 413, 130, 3, *[1] * 70, 5, 1, 1)
PADDING = 37


def windowed_model(family: str):
    sizes = {"num_hidden_layers": 2, "max_position_embeddings": 4096}
    if family == "llama4_text":
        return tiny_family(family, attention_chunk_size=WINDOW, max_position_embeddings=4096)
    own = {
        "gemma3": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW},
        "mistral": {"sliding_window": WINDOW},
        "qwen2": {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": WINDOW},
    }
    return tiny_model(family, **sizes, **own[family])


def logits(model, cache, chunks=CHUNKS, seed=0):
    """Of two sequences, one of them padded, without the padding's."""
    ids = token_ids(sum(chunks), batch=2, seed=seed)
    mask = torch.ones_like(ids)
    mask[0, :PADDING] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    parts, start = [], 0
    with torch.no_grad():
        for count in chunks:
            stop = start + count
            given = {"attention_mask": mask[:, :stop], "position_ids": positions[:, start:stop]}
            parts.append(model(input_ids=ids[:, start:stop], past_key_values=cache, **given).logits)
            start = stop
    return torch.cat(parts, dim=1)[mask.bool()]


@pytest.mark.parametrize("window", [0, 64])
@pytest.mark.parametrize("family", ["gemma3", "mistral", "qwen2", "llama4_text"])
def test_lossless_pages_change_nothing_while_the_window_slides(family, window):
    model = windowed_model(family)
    geometry = geometry_of(model)
    assert geometry.windowed_layers
    assert geometry.chunked is (family == "llama4_text")
    expected = logits(model, DynamicCache(config=model.config))
    with kvcar.attach(model, kvcar.lossless(model, window=window)) as attached:
        cache = attached.new_cache()
        got = logits(model, cache)
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-4)
    store = cache._pages.windowed
    first = max(0, sum(CHUNKS) - WINDOW + 1)
    if family == "llama4_text":
        first = (sum(CHUNKS) - PADDING) // WINDOW * WINDOW
    assert store.freed_pages == first // 64 > 0
    assert store.allocated_pages == -(-store.tokens // 64) - store.freed_pages


def test_pages_behind_the_window_take_no_memory_and_the_others_are_read():
    model = windowed_model("mistral")
    with kvcar.attach(model, kvcar.lossless(model)) as attached:
        cache = attached.new_cache()
        logits(model, cache)
        assert (
            cache.stored_bytes_by_part()["pages"]
            == cache._pages.windowed.allocated_pages * 64 * (2 * 2 * 2 * 2) * 16 * 4
        )
        fork = cache.fork()
        cache._pages.windowed.arenas = [torch.zeros_like(arena) for arena in cache._pages.windowed.arenas]
        cache._views[True].forget()
        # A token that is in the window is, so the test can fail.
        ids = token_ids(1, batch=2, seed=1)
        mask = torch.ones(2, sum(CHUNKS) + 1, dtype=torch.int64)
        mask[0, :PADDING] = 0
        position = mask.sum(-1, keepdim=True) - 1
        with torch.no_grad():
            zeros, right = (
                model(input_ids=ids, attention_mask=mask, position_ids=position, past_key_values=each).logits
                for each in (cache, fork)
            )
    assert not torch.allclose(zeros, right, atol=1e-3)


def test_windows_below_512_tokens_stay_exact():
    geometry = geometry_of(tiny_model("mistral", sliding_window=WINDOW - 1))
    assert geometry.windowed_layers == ()
    assert geometry.sliding_layers == (0, 1, 2, 3)


def test_a_bundle_from_before_windows_were_compressed_still_attaches():
    model = windowed_model("gemma3")
    own = geometry_of(model)
    bundle = kvcar.lossless(model)
    before = own.with_exact_windows()
    blocks = tuple(block for block in bundle.plan.blocks if block.slots[0].layer == 1)
    plan = Plan(geometry=before, blocks=blocks, cache=bundle.plan.cache, exact_dtype="model")
    old = kvcar.Bundle(plan, bundle.blocks[: len(blocks)], bundle.fingerprint, bundle.model, bundle.fit)
    expected = logits(model, DynamicCache(config=model.config))
    with kvcar.attach(model, old) as attached:
        torch.testing.assert_close(logits(model, attached.new_cache()), expected, atol=2e-4, rtol=1e-4)


def test_sequences_are_reordered_repeated_and_forked():
    model = windowed_model("gemma3")
    ids = token_ids(640, batch=2)
    more = token_ids(3, batch=3, seed=5)
    places = torch.tensor([1, 0, 1])
    with torch.no_grad(), kvcar.attach(model, kvcar.lossless(model)) as attached:
        caches = attached.new_cache(), DynamicCache(config=model.config)
        for cache in caches:
            model(input_ids=ids, past_key_values=cache)
            cache.reorder_cache(places)
        fork = caches[0].fork()
        fork.batch_repeat_interleave(2)
        got, expected = (model(input_ids=more, past_key_values=cache).logits for cache in caches)
        torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-4)
        repeated = model(input_ids=more.repeat_interleave(2, dim=0), past_key_values=fork).logits
        torch.testing.assert_close(repeated[::2], expected, atol=2e-4, rtol=1e-4)


def test_tokens_are_taken_back_where_the_window_is_still_there_and_refused_where_not():
    model = windowed_model("gemma3")
    ids = token_ids(720)
    with torch.no_grad(), kvcar.attach(model, kvcar.lossless(model)) as attached:
        cache, fresh = attached.new_cache(), attached.new_cache()
        model(input_ids=ids[:, :700], past_key_values=cache)
        with pytest.raises(CacheStateError, match="have forgotten what came before"):
            cache.crop(-100)
        assert cache.tokens == 700
        cache.crop(-40)
        got = model(input_ids=ids[:, 660:], past_key_values=cache).logits
        model(input_ids=ids[:, :660], past_key_values=fresh)
        expected = model(input_ids=ids[:, 660:], past_key_values=fresh).logits
        torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-4)
        cache.activate_past_recording()
        freed = cache._pages.windowed.freed_pages
        model(input_ids=token_ids(150, seed=3), past_key_values=cache)
        assert cache._pages.windowed.freed_pages == freed
        cache.crop(-150)
        model(input_ids=token_ids(150, seed=3), past_key_values=cache)
        cache.crop(0)
        assert cache._pages.windowed.freed_pages == (720 + 150 - WINDOW + 1) // 64


def test_generation_with_prompt_lookup_takes_tokens_back_past_the_window():
    model = windowed_model("gemma3")
    ids = token_ids(20, seed=4).repeat(1, 30)
    with kvcar.attach(model, kvcar.lossless(model)) as attached:
        # Older releases of transformers look for an end in what is looked up, also where there is none.
        given = {"max_new_tokens": 60, "do_sample": False, "eos_token_id": 127}
        plain = model.generate(ids, past_key_values=attached.new_cache(), **given)
        looked_up = model.generate(ids, past_key_values=attached.new_cache(), prompt_lookup_num_tokens=5, **given)
    # Older releases end one token later, with and without kvcar.
    assert torch.equal(plain, looked_up[:, : plain.shape[1]])


def test_finer_pages_are_freed_with_their_window():
    model = windowed_model("gemma3")
    blocks = [tuple(Slot(layer, head, kind) for kind in ("key", "value") for head in range(2)) for layer in (0, 1)]
    bundle = kvcar.fit(
        model, token_ids=token_ids(256, batch=10, seed=7), samples=False, effect_tokens=512, times_smaller=2.0, check=False,
        cache=CacheConfig(max_page_cost=1e-9),
    )  # fmt: skip
    assert {slot.layer for block in bundle.plan.blocks for slot in block.slots} == {s.layer for b in blocks for s in b}
    expected = logits(model, DynamicCache(config=model.config))
    with kvcar.attach(model, bundle) as attached:
        cache = attached.new_cache()
        got = logits(model, cache)
        fork = cache.fork()
    # Every page is finer, so that everything but float16 is exact.
    assert cache.finer_page_share() == 1.0
    torch.testing.assert_close(got, expected, atol=0.1, rtol=0.01)
    full, windowed = cache._coded[1], cache._coded[0]
    assert windowed.finer == full.finer - cache._pages.windowed.freed_tokens
    assert windowed.buffers[0].shape[2] == full.buffers[0].shape[2] - cache._pages.windowed.freed_tokens
    assert fork.stored_bytes_by_part()["finer"] == cache.stored_bytes_by_part()["finer"]


def test_all_layers_of_a_gemma_are_coded_five_times_smaller_than_its_own_cache():
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    model = tiny_model(
        "gemma3", num_hidden_layers=6, layer_types=kinds, sliding_window=WINDOW, max_position_embeddings=4096,
        initializer_range=0.05,
    )  # fmt: skip
    bundle = kvcar.fit(
        model, token_ids=token_ids(512, batch=8), times_smaller=5.5, samples=False, effect_tokens=1024, check=False
    )
    assert bundle.plan.coded_layers == (0, 1, 2, 3, 4, 5)
    ids = token_ids(4096, seed=3)
    own = DynamicCache(config=model.config)
    with torch.no_grad(), kvcar.attach(model, bundle) as attached:
        cache = attached.new_cache()
        kl = []
        for part in ids.split(512, dim=1):
            full = model(input_ids=part, past_key_values=own).logits.log_softmax(-1)
            got = model(input_ids=part, past_key_values=cache).logits.log_softmax(-1)
            kl.append((full.exp() * (full - got)).sum(-1).mean())
    in_bfloat16 = sum(layer.keys.numel() + layer.values.numel() for layer in own.layers) * 2
    assert in_bfloat16 == bundle.plan.geometry.full_bytes(4096)
    assert in_bfloat16 / cache.stored_bytes(in_bfloat16=True) >= 5
    assert sum(kl) / len(kl) < 0.001


@pytest.mark.parametrize("attend", [attend_in_tiles], ids=["tiled"])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_kernels_hide_what_the_window_of_each_query_has_passed(attend, tokens):
    model = windowed_model("gemma3")
    blocks = [tuple(Slot(layer, head, kind) for head in range(2)) for layer in (0, 1) for kind in ("key", "value")]
    seen = {}

    def compared(query, exact, paged, scaling, softcap=None, sinks=None):
        expected = attend_naively(query, exact, paged, scaling, softcap, sinks)
        got = attend(query, exact, paged, scaling, softcap, sinks)
        seen[paged.since is not None] = float((got - expected).abs().max())
        return expected

    bundle = by_hand(model, blocks, window=64, page_tokens=64)
    with torch.no_grad(), kvcar.attach(model, bundle) as attached:
        cache = attached.new_cache()
        logits(model, cache, (600,))
        ids, host = token_ids(tokens, batch=2, seed=2), attached
        mask = torch.ones(2, 600 + tokens, dtype=torch.int64)
        mask[0, :PADDING] = 0
        host._current.mask = None
        cache.begin_pass(host, 2, tokens, mask, (mask.cumsum(-1) - 1)[:, 600:])
        key = torch.randn(2, 2, tokens, 16)
        cache.write(0, key, key)
        compared(torch.randn(2, 4, tokens, 16), *cache.past(0, tokens), 0.25)
        cache.leave_pass()
    assert ids.shape[1] == tokens
    assert seen == {tokens > 1: pytest.approx(0, abs=1e-4)}


def test_a_block_of_both_kinds_of_layers_is_refused():
    geometry = geometry_of(windowed_model("gemma3"))
    with pytest.raises(PlanError, match="layers that keep a window and of layers that keep everything"):
        Plan.checked(geometry=geometry, blocks=(Block(codec="identity", slots=(Slot(0, 0, "key"), Slot(1, 0, "key"))),))


def test_a_mask_that_is_not_the_windows_is_refused():
    model = windowed_model("mistral")
    with torch.no_grad(), kvcar.attach(model, kvcar.lossless(model)) as attached:
        cache = attached.new_cache()
        causal = torch.ones(700, 700, dtype=torch.bool).tril()[None, None]
        with pytest.raises(UnsupportedModelError, match="the last 512 tokens of 700"):
            model(input_ids=token_ids(700), attention_mask=causal, past_key_values=cache)


def test_measuring_with_decoded_pages_gives_the_same():
    model = windowed_model("gemma3")
    bundle = kvcar.lossless(model)
    with kvcar.attach(model, bundle) as attached:
        plain, decoded = logits(model, attached.new_cache()), logits(model, KVCarCache(bundle, keep_decoded=True))
    torch.testing.assert_close(decoded, plain, atol=2e-4, rtol=1e-4)
