"""Stored contexts: what is loaded is what was saved, and whatever does not fit is refused."""

import sys

import pytest
import torch
from bundles import by_hand, exact, fitted
from containers import filled, step
from tiny import FAMILIES, tiny_model, token_ids

import kvcar
from kvcar.cache.cache import KVCarCache
from kvcar.cache.snapshot import contents_of
from kvcar.context import read_context
from kvcar.errors import (
    AttachError,
    CacheStateError,
    ContextError,
    InputError,
    ModelMismatchError,
    UnsupportedModelError,
)
from kvcar.geometry import Slot
from kvcar.plan import Reuse

NEXT = 40


def held(cache):
    """Every tensor that a cache holds, without coding anything."""
    contents = contents_of(cache, keep_window=True)
    pairs = [*contents.exact.values(), *contents.plain.values(), *((unit.raw, unit.codes) for unit in contents.units)]
    return [contents.padding, contents.offset, *(tensor for pair in pairs for tensor in pair)]


def assert_same(a, b):
    assert a.get_seq_length() == b.get_seq_length()
    assert a.batch_size == b.batch_size
    for x, y in zip(held(a), held(b), strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)


def mixed(model):
    """Raw latents beside packed ones, slots left exact in coded layers, reuse, and a layer left alone."""
    blocks = [tuple(Slot(i, h, "key") for i in (0, 1) for h in (0, 1)), (Slot(3, 1, "value"),)]
    reuses = (Reuse(slot=Slot(3, 0, "key"), source=Slot(0, 0, "key")),)
    return by_hand(model, blocks, bits=[16, 7, 3, 1], reuses=reuses)


KINDS = {
    "linear over all layers": lambda m: fitted(m, bits=3, layers_per_block=4),
    "linear without sinks": lambda m: fitted(m, bits=3, sinks=0),
    "autoencoder of raw latents": lambda m: fitted(m, codec="autoencoder", latent_bits=16, steps=2),
    "dynamic scales": lambda m: fitted(m, key_latents=12, value_latents=16, scales="dynamic"),
    "quantised identity": lambda m: fitted(m, codec="identity", bits=5),
    "lossless": lambda m: fitted(m, codec="identity"),
    "mixed": mixed,
    "nothing coded": exact,
}


@pytest.mark.parametrize("keep_window", [False, True], ids=["coded window", "kept window"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_bundle_comes_back(kind, keep_window, tmp_path):
    model = tiny_model("llama")
    bundle = KINDS[kind](model)
    with kvcar.attach(model, bundle):
        for tokens in (150, 7):
            cache = filled(model, bundle, token_ids(tokens))
            before = [x.clone() for x in held(cache)]
            cache.save(tmp_path / "a.ctx", keep_window=keep_window)
            assert all(torch.equal(x, y) for x, y in zip(held(cache), before, strict=True)), "saving changes nothing"
            loaded = KVCarCache.load(tmp_path / "a.ctx", model)
            if not keep_window:
                cache.flush_window()
            assert_same(loaded, cache)
            for part in token_ids(NEXT, seed=4).split(3, dim=1):
                assert torch.equal(step(model, loaded, part), step(model, cache, part))
            assert_same(loaded, cache)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_goes_on_generating(family, tmp_path):
    model = tiny_model(family)
    bundle = fitted(model, bits=6)
    ids = token_ids(180)
    with kvcar.attach(model, bundle):
        cache = filled(model, bundle, ids[:, :150])
        cache.save(tmp_path / "a.ctx")
        loaded = KVCarCache.load(tmp_path / "a.ctx", model)
        cache.flush_window()
        options = {"max_new_tokens": 20, "do_sample": False}
        expected = model.generate(ids, past_key_values=cache, **options)
        assert torch.equal(model.generate(ids, past_key_values=loaded, **options), expected)
        # transformers also takes just the new tokens, with a mask over all of them
        again, mask = KVCarCache.load(tmp_path / "a.ctx", model), torch.ones(1, 180, dtype=torch.int64)
        new = model.generate(ids[:, 150:], past_key_values=again, attention_mask=mask, **options)
    assert torch.equal(new[:, 30:], expected[:, 180:])


@pytest.mark.parametrize("tokens", [1, 4, 5, 31, 32, 33, 64, 65, 96, 129])
@pytest.mark.parametrize("window", [0, 32])
def test_odd_lengths(llama, tokens, window, tmp_path):
    """Also less than the sinks, partly filled pages, and a context that nothing of is in pages yet."""
    model, bundle = llama
    with kvcar.attach(model, bundle):
        cache = filled(model, bundle, token_ids(tokens), window)
        cache.save(tmp_path / "a.ctx")
        loaded = KVCarCache.load(tmp_path / "a.ctx", model)
        assert loaded.plan.window == window
        cache.flush_window()
        assert_same(loaded, cache)
        assert torch.equal(step(model, loaded, token_ids(NEXT)), step(model, cache, token_ids(NEXT)))


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3"])
def test_batches_with_left_padding(family, tmp_path):
    model = tiny_model(family)
    bundle = fitted(model, bits=7)
    lengths = torch.tensor([150, 149, 80, 3])
    mask = (torch.arange(150 + NEXT) >= 150 - lengths[:, None]).long()
    ids = token_ids(150 + NEXT, batch=4)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with kvcar.attach(model, bundle):
        cache = filled(model, bundle, ids[:, :150], attention_mask=mask[:, :150], position_ids=positions[:, :150])
        cache.save(tmp_path / "a.ctx", token_ids=ids[:, :150])
        loaded = KVCarCache.load(tmp_path / "a.ctx", model)
        cache.flush_window()
        assert_same(loaded, cache)
        more = {"attention_mask": mask, "position_ids": positions[:, 150:]}
        assert torch.equal(step(model, loaded, ids[:, 150:], **more), step(model, cache, ids[:, 150:], **more))
    assert read_context(tmp_path / "a.ctx").header.padding == (0, 1, 70, 147)


@pytest.mark.parametrize("keep_window", [False, True], ids=["coded window", "kept window"])
def test_layers_whose_window_has_passed_pages(keep_window, tmp_path):
    kinds = ["sliding_attention", "full_attention"]
    model = tiny_model(
        "gemma3", num_hidden_layers=2, layer_types=kinds, sliding_window=512, max_position_embeddings=2048
    )
    blocks = [tuple(Slot(i, h, kind) for h in (0, 1)) for i in (1, 0) for kind in ("key", "value")]
    bundle = by_hand(model, blocks, bits=[7, 3, 1], window=64, page_tokens=64)
    with torch.no_grad(), kvcar.attach(model, bundle) as attached:
        cache = attached.new_cache()
        model(input_ids=token_ids(700, batch=2), past_key_values=cache)
        cache.save(tmp_path / "context.kvcar", keep_window=keep_window)
        loaded = KVCarCache.load(tmp_path / "context.kvcar", model)
        store, own = loaded._pages.windowed, cache if keep_window else cache.fork()
        assert store.freed_pages > 0
        if not keep_window:
            own.flush_window()
        assert_same(loaded, own)
        ids = token_ids(3, batch=2, seed=2)
        got, expected = (model(input_ids=ids, past_key_values=each).logits for each in (loaded, own))
    torch.testing.assert_close(got, expected)


def test_a_loaded_cache_can_be_cropped_saved_and_loaded_again(llama, tmp_path):
    model, bundle = llama
    first, second = tmp_path / "a.ctx", tmp_path / "b.ctx"
    with kvcar.attach(model, bundle):
        filled(model, bundle, token_ids(150)).save(first)
        loaded = KVCarCache.load(first, model)
        loaded.save(second, keep_window=True)
        assert first.read_bytes() == second.read_bytes()
        loaded.crop(-17)
        step(model, loaded, token_ids(60, seed=2))
        loaded.save(second)
        again = KVCarCache.load(second, model)
        loaded.flush_window()
        assert_same(again, loaded)


def test_a_loaded_cache_and_its_fork_do_not_touch_each_other(llama, saved):
    model, bundle = llama
    with kvcar.attach(model, bundle):
        loaded, one, two = (KVCarCache.load(saved, model) for _ in range(3))
        forked = loaded.fork()
        first, second = token_ids(NEXT, seed=1), token_ids(NEXT, seed=2)
        # Turn by turn, the way two conversations go on from one document.
        for x, y in zip(first.split(8, dim=1), second.split(8, dim=1), strict=True):
            assert torch.equal(step(model, loaded, x), step(model, one, x))
            assert torch.equal(step(model, forked, y), step(model, two, y))
        assert_same(loaded, one)
        assert_same(forked, two)


def test_a_kept_window_needs_one_pass_before_it_can_be_coded(llama, tmp_path):
    model, bundle = llama
    with kvcar.attach(model, bundle):
        filled(model, bundle, token_ids(150)).save(tmp_path / "a.ctx", keep_window=True)
    with kvcar.attach(model, bundle):
        loaded = KVCarCache.load(tmp_path / "a.ctx", model)
        with pytest.raises(CacheStateError, match="keep_window=True"):
            loaded.save(tmp_path / "b.ctx")
        loaded.save(tmp_path / "b.ctx", keep_window=True)
        step(model, loaded, token_ids(1))
        loaded.save(tmp_path / "b.ctx")
    assert read_context(tmp_path / "b.ctx").header.tokens == 151


def test_loading_before_attaching_and_with_another_window(llama, saved):
    model, bundle = llama
    with pytest.raises(AttachError, match="give the bundle"):
        KVCarCache.load(saved, model)
    loaded = KVCarCache.load(saved, model, bundle, window=64)
    with kvcar.attach(model, bundle):
        attached = KVCarCache.load(saved, model, window=64)
        assert_same(loaded, attached)
        assert loaded.plan.window == 64
        assert torch.equal(step(model, loaded, token_ids(NEXT)), step(model, attached, token_ids(NEXT)))
        with pytest.raises(InputError, match="multiple of the page size"):
            KVCarCache.load(saved, model, window=33)


def test_the_bundle_may_be_read_from_its_folder(llama, saved, tmp_path):
    model, bundle = llama
    bundle.save_pretrained(tmp_path / "bundle")
    loaded = KVCarCache.load(saved, model, tmp_path / "bundle")
    assert loaded.get_seq_length() == 150
    with kvcar.attach(model, bundle) as attachment:
        assert KVCarCache.load(saved, model, tmp_path / "bundle").bundle is attachment.bundle


def test_what_a_file_says(saved, llama):
    stored = read_context(saved)
    assert torch.equal(stored.token_ids, token_ids(150))
    assert stored.header.tokens == stored.header.paged == 150
    assert stored.header.bundle_sha256 == llama[1].digest
    assert stored.stored_bytes == saved.stat().st_size


def test_another_bundle_or_model_is_refused(llama, saved):
    model, bundle = llama
    with pytest.raises(ContextError, match="saved with another bundle"):
        KVCarCache.load(saved, model, fitted(model, bits=5))
    other = tiny_model("llama", seed=1)
    with pytest.raises(ModelMismatchError, match="sampled weights differ"):
        KVCarCache.load(saved, other, bundle)
    with kvcar.attach(other, fitted(other, bits=4)), pytest.raises(ModelMismatchError, match="sampled weights differ"):
        KVCarCache.load(saved, other, bundle)
    with pytest.raises(ModelMismatchError):
        KVCarCache.load(saved, tiny_model("gpt2"), bundle)


@pytest.mark.parametrize("keep_window", [False, True], ids=["coded window", "kept window"])
def test_finer_pages_come_back(keep_window, tmp_path):
    model = tiny_model("llama")
    bundle = fitted(model, codec="linear8", metric="effect", times_smaller=4, max_page_cost=1e-12)
    ids = token_ids(150, batch=2)
    with kvcar.attach(model, bundle) as attached, torch.no_grad():
        cache = attached.new_cache()
        model(ids, past_key_values=cache)
        cache.save(tmp_path / "a.ctx", keep_window=keep_window)
        loaded = KVCarCache.load(tmp_path / "a.ctx", model)
        if keep_window:
            assert_same(cache, loaded)
        assert loaded.finer_page_share() == 1.0
        step = token_ids(1, batch=2, seed=5)
        got, expected = (model(step, past_key_values=each).logits for each in (loaded, cache))
        assert (got - expected).square().mean().sqrt() < 2e-3 * expected.std()
        loaded.crop(70 - loaded.tokens)
        assert loaded.stored_bytes_by_part()["finer"] > 0


def test_another_dtype_is_refused_where_it_matters(tmp_path):
    model = tiny_model("llama")
    coarse = tiny_model("llama", dtype=torch.bfloat16)
    for bundle in (fitted(model, bits=4), exact(model), fitted(model, codec="identity")):
        with kvcar.attach(model, bundle):
            filled(model, bundle, token_ids(80)).save(tmp_path / "a.ctx")
        with pytest.raises(ContextError, match="load the model with the dtype"):
            KVCarCache.load(tmp_path / "a.ctx", coarse, bundle)
    # Sinks are float16 in a float16 model and in a float32 one
    half = tiny_model("llama", dtype=torch.float16)
    with kvcar.attach(half, fitted(half, bits=4)) as attached:
        filled(half, attached.bundle, token_ids(80)).save(tmp_path / "b.ctx")
    assert KVCarCache.load(tmp_path / "b.ctx", model, attached.bundle).get_seq_length() == 80


def test_what_cannot_be_saved(llama, tmp_path):
    model, bundle = llama
    with kvcar.attach(model, bundle):
        with pytest.raises(CacheStateError, match="no tokens yet"):
            KVCarCache(bundle).save(tmp_path / "a.ctx")
        cache = filled(model, bundle, token_ids(20))
        for ids in (token_ids(19), token_ids(20)[0], token_ids(20, batch=2)):
            with pytest.raises(InputError, match=r"give \(1, 20\)"):
                cache.save(tmp_path / "a.ctx", token_ids=ids)
        for ids in (token_ids(20) - 200, token_ids(20) + 2**31, token_ids(20).float()):
            with pytest.raises(InputError, match="ids of the tokenizer"):
                cache.save(tmp_path / "a.ctx", token_ids=ids)
        for path in (tmp_path / "no" / "a.ctx", tmp_path / "a\0b"):
            with pytest.raises(ContextError, match="cannot write"):
                cache.save(path)
        cache.layers[2].buffers[0][0, 0, 10] = torch.nan
        with pytest.raises(CacheStateError, match="keys of layer 2 hold NaN"):
            cache.save(tmp_path / "a.ctx")
        with pytest.raises(CacheStateError, match="exact of the cache hold NaN"):
            cache.save(tmp_path / "a.ctx", keep_window=True)
        assert cache.get_seq_length() == 20
        step(model, cache, token_ids(1))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("library", ["constriction", "zstandard"])
def test_without_the_extra_it_says_what_to_install(llama, tmp_path, library, monkeypatch):
    model, bundle = llama
    monkeypatch.setitem(sys.modules, library, None)
    with kvcar.attach(model, bundle), pytest.raises(InputError, match=r"kvcar\[store\]"):
        filled(model, bundle, token_ids(20)).save(tmp_path / "a.ctx")


def test_flushing_the_window_is_what_saving_does_and_lets_later_tokens_fill_one(llama):
    model, bundle = llama
    with kvcar.attach(model, bundle):
        cache = filled(model, bundle, token_ids(100))
        cache.flush_window()
        assert cache._pages.tokens == 100
        bytes_before = cache.stored_bytes_by_part()["exact"]
        cache.flush_window()  # nothing more to do
        step(model, cache, token_ids(5))
        assert cache._pages.tokens == 100
        assert cache.stored_bytes_by_part()["exact"] > bytes_before
        KVCarCache(bundle).flush_window()


def test_a_lost_sequence_is_not_saved_and_the_others_are(tmp_path):
    model, ids, step = tiny_model("llama"), token_ids(120, 2), token_ids(1, 2, 5)
    given = model.get_input_embeddings()(ids).detach()
    given[1, 60] = torch.nan
    with kvcar.attach(model, fitted(model, times_smaller=3)) as attached, torch.no_grad():
        cache = attached.new_cache()
        model(inputs_embeds=given, past_key_values=cache)
        with pytest.raises(CacheStateError, match=r"sequences \[1\].*batch_select_indices"):
            cache.save(tmp_path / "context")
        cache.batch_select_indices(torch.tensor([0]))
        cache.save(tmp_path / "context", keep_window=True)
        loaded = KVCarCache.load(tmp_path / "context", model)
        got, expected = (model(step[:1], past_key_values=each).logits for each in (loaded, cache))
        assert got.isfinite().all()
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("kernels", ["cpu", "torch"])
def test_positions_that_begin_late_are_right_also_in_a_loaded_cache(kernels, monkeypatch, tmp_path):
    monkeypatch.setenv("KVCAR_KERNELS", kernels)
    model = tiny_model("llama")
    bundle, ids = fitted(model, codec="identity", bits=8, window=0), token_ids(151)
    positions = torch.arange(151)[None] + 300
    with torch.no_grad(), kvcar.attach(model, bundle) as attached:
        cache = attached.new_cache()
        model(ids[:, :150], position_ids=positions[:, :150], past_key_values=cache)
        cache.save(tmp_path / "late")
        expected = model(ids[:, 150:], position_ids=positions[:, 150:], past_key_values=cache).logits
    fresh = tiny_model("llama")  # has made no tables of angles yet
    with torch.no_grad(), kvcar.attach(fresh, bundle):
        loaded = KVCarCache.load(tmp_path / "late", fresh)
        got = fresh(ids[:, 150:], position_ids=positions[:, 150:], past_key_values=loaded).logits
    torch.testing.assert_close(got, expected)


class Wrapped:
    """What wraps a model as peft does."""

    def __init__(self, model):
        self._model = model

    def get_base_model(self):
        return self._model


def test_a_wrapped_model_is_the_model_and_others_are_refused(llama, saved):
    model, bundle = llama
    for wrapped in (Wrapped(model), torch.compile(model, backend="eager")):
        assert KVCarCache.load(saved, wrapped, bundle).tokens == 150
        with kvcar.attach(model, bundle):
            assert KVCarCache.load(saved, wrapped).tokens == 150
    for other in (None, torch.nn.Linear(2, 2), "model"):
        with pytest.raises(UnsupportedModelError, match="load takes a model of transformers, got"):
            KVCarCache.load(saved, other, bundle)


def test_a_context_that_was_loaded_before_its_model_was_attached_takes_any_tokens(tmp_path):
    model = tiny_model("llama")
    bundle, ids = fitted(model, codec="identity", window=0), token_ids(150)
    with kvcar.attach(model, bundle) as attached:
        cache = attached.new_cache()
        step(model, cache, ids[:, :100])
        cache.save(tmp_path / "a.ctx")
    loaded = KVCarCache.load(tmp_path / "a.ctx", model, bundle)
    with kvcar.attach(model, bundle):
        for part in ids[:, 100:].split(7, dim=1):
            assert torch.equal(step(model, loaded, part), step(model, cache, part))
