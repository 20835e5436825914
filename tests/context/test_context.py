"""Stored contexts: what is loaded is what was saved, and whatever does not fit is refused."""

import json
import struct
import sys

import pytest
import torch
from bundles import by_hand, exact, fitted
from tiny import FAMILIES, tiny_model, token_ids

import kvcar
from kvcar.errors import AttachError, CacheStateError, ContextError, InputError, ModelMismatchError
from kvcar.plan import Reuse
from kvcar.cache.cache import KVCarCache
from kvcar.context.context import read_context
from kvcar.context.file import MAGIC
from kvcar.cache.snapshot import contents_of
from kvcar.geometry import Slot

NEXT = 40


@pytest.fixture(scope="module")
def llama():
    model = tiny_model("llama")
    return model, fitted(model, times_smaller=4, layers_per_block=2)


@pytest.fixture
def saved(llama, tmp_path):
    """A context of 150 tokens with its token ids, and where it lies."""
    model, bundle = llama
    path = tmp_path / "a.ctx"
    with kvcar.attach(model, bundle):
        filled(model, bundle, token_ids(150)).save(path, token_ids=token_ids(150))
    return path


@torch.no_grad()
def step(model, cache, ids, **inputs):
    return model(input_ids=ids, past_key_values=cache, use_cache=True, **inputs).logits


def filled(model, bundle, ids, window=None, **inputs):
    cache = KVCarCache(bundle, window)
    step(model, cache, ids, **inputs)
    return cache


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
    bundle.save(tmp_path / "bundle", "card")
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


def test_another_dtype_is_refused_where_it_matters(tmp_path):
    model = tiny_model("llama")
    for bundle, same in (
        (fitted(model, bits=4), True),
        (exact(model), False),
        (fitted(model, codec="identity"), False),
    ):
        with kvcar.attach(model, bundle):
            filled(model, bundle, token_ids(80)).save(tmp_path / "a.ctx")
        coarse = tiny_model("llama", dtype=torch.bfloat16)
        if same:  # sinks are bfloat16 with both
            assert KVCarCache.load(tmp_path / "a.ctx", coarse, bundle).get_seq_length() == 80
        else:
            with pytest.raises(ContextError, match="load the model with the dtype"):
                KVCarCache.load(tmp_path / "a.ctx", coarse, bundle)


@pytest.mark.parametrize("where", [0, 4, 9, 20, 200, 0.3, 0.6, 0.9, -40, -1])
def test_a_changed_byte_is_noticed(llama, saved, where):
    model, bundle = llama
    data = bytearray(saved.read_bytes())
    data[int(where * len(data)) if isinstance(where, float) else where] ^= 4
    saved.write_bytes(data)
    for read in (lambda: KVCarCache.load(saved, model, bundle), lambda: read_context(saved)):
        with pytest.raises(ContextError, match=r"truncated or was changed|not a stored context|format version"):
            read()


@pytest.mark.parametrize("kept", [0, 5, 12, 30, 60, 500, 0.5, -33, -1])
def test_a_truncated_file_is_noticed(llama, saved, kept):
    data = saved.read_bytes()
    saved.write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    with pytest.raises(ContextError, match=r"truncated or was changed|not a stored context"):
        KVCarCache.load(saved, *llama)


def rewritten(path, change):
    """The file with its header changed and every checksum over the file in order."""
    import hashlib

    data = path.read_bytes()
    start, size = len(MAGIC) + 8, struct.unpack("<Q", data[len(MAGIC) : len(MAGIC) + 8])[0]
    header = json.loads(data[start : start + size])
    change(header)
    text = json.dumps(header).encode()
    body = MAGIC + struct.pack("<Q", len(text)) + text + data[start + size : -32]
    path.write_bytes(body + hashlib.sha256(body).digest())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h.update(format_version=2), "version 2; this kvcar reads version 1"),
        (lambda h: h.update(surprise=1), "header does not fit at surprise"),
        (lambda h: h.update(tokens=-3), "header does not fit at tokens"),
        (lambda h: h.update(padding=[0, 0], offset=[0, 0]), "where this model needs"),
        (lambda h: h.update(offset=[0, 0]), "2 offsets for 1 sequences"),
        (lambda h: h.update(padding=[151]), "more padding than the 150 tokens"),
        (lambda h: h.update(paged=149), "where this model needs"),
        (lambda h: h.update(tokens=151), "where this model needs"),
        (lambda h: h["parts"].pop(), "do not add up"),
        (lambda h: h["parts"][0].update(stored_bytes=4), "do not add up"),
        (lambda h: h["parts"][0].update(name="exact"), "do not add up"),
        (lambda h: h["parts"][0].update(sha256="0" * 64), "does not decode to what was saved"),
        (lambda h: h["parts"][1].update(shape=[4, 2, 1, 2, 4, 17]), "where this model needs"),
        (lambda h: h["parts"][1].update(dtype="object"), "header does not fit"),
    ],
)
def test_headers_that_do_not_fit_are_refused(llama, saved, change, message):
    rewritten(saved, change)
    with pytest.raises(ContextError, match=message):
        KVCarCache.load(saved, *llama)


def test_files_that_are_no_contexts(llama, tmp_path):
    with pytest.raises(ContextError, match="kvcar save"):
        KVCarCache.load(tmp_path / "nothing", *llama)
    with pytest.raises(ContextError, match="cannot read"):
        KVCarCache.load(tmp_path, *llama)
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ContextError, match="not a stored context"):
        read_context(tmp_path / "text")


def test_what_cannot_be_saved(llama, tmp_path):
    model, bundle = llama
    with kvcar.attach(model, bundle):
        with pytest.raises(CacheStateError, match="no tokens yet"):
            KVCarCache(bundle).save(tmp_path / "a.ctx")
        cache = filled(model, bundle, token_ids(20))
        for ids in (token_ids(19), token_ids(20)[0], token_ids(20, batch=2)):
            with pytest.raises(InputError, match=r"give \(1, 20\)"):
                cache.save(tmp_path / "a.ctx", token_ids=ids)
        with pytest.raises(ContextError, match="cannot write"):
            cache.save(tmp_path / "no" / "a.ctx")
        cache.layers[2].buffers[0][0, 0, 10] = torch.nan
        with pytest.raises(CacheStateError, match="keys of layer 2 hold NaN"):
            cache.save(tmp_path / "a.ctx")
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
