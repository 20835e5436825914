"""The compressed cache in the hands of ``generate``: defaults, chunks, padding, beams, several models."""

import copy
import pickle

import pytest
import torch
from bundles import by_hand, fitted
from tiny import FAMILIES, tiny_model, token_ids
from transformers import DynamicCache

import kvcar
from kvcar.cache.cache import KVCarCache
from kvcar.errors import AttachError, CacheStateError, InputError, ModelMismatchError, UnsupportedModelError
from kvcar.geometry import Slot


@pytest.fixture(scope="module")
def llama():
    model = tiny_model("llama")
    return model, fitted(model, times_smaller=4, layers_per_block=2)


def step(model, cache, ids, **inputs):
    with torch.no_grad():
        return model(input_ids=ids, past_key_values=cache, use_cache=True, **inputs).logits


def fill(model, cache, ids, chunk=64):
    return torch.cat([step(model, cache, part) for part in ids.split(chunk, dim=1)], 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_generates_over_a_compressed_cache(family):
    model = tiny_model(family)
    bundle = fitted(model, bits=6)
    with kvcar.attach(model, bundle) as attachment:
        cache = attachment.new_cache()
        out = model.generate(token_ids(200), past_key_values=cache, max_new_tokens=20, do_sample=False)
    assert out.shape == (1, 220)
    assert cache.get_seq_length() == 219
    assert cache.stored_bytes_by_part()["pages"] > 0
    if family == "gemma3":
        assert cache.is_sliding == [True, False, True, False]


def test_plain_generate_uses_a_compressed_cache_and_others_stay_possible(llama):
    model, bundle = llama
    ids = token_ids(150)
    full = model.generate(ids, max_new_tokens=8, do_sample=False)
    with kvcar.attach(model, bundle):
        out = model.generate(ids, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
        assert isinstance(out.past_key_values, KVCarCache)
        own = model.generate(ids, max_new_tokens=8, do_sample=False, past_key_values=DynamicCache(config=model.config))
        assert torch.equal(own, full)
        assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=False), full)


def test_generate_prefills_in_chunks(llama):
    model, bundle = llama
    lengths = []
    with kvcar.attach(model, bundle, prefill_chunk=64):
        handle = model.model.register_forward_pre_hook(
            lambda m, a, kw: lengths.append(kw["input_ids"].shape[1]), with_kwargs=True
        )
        model.generate(token_ids(150), max_new_tokens=2, do_sample=False)
    handle.remove()
    assert lengths == [64, 64, 22, 1]


def test_a_cache_can_be_continued(llama):
    model, bundle = llama
    ids = token_ids(180)
    with kvcar.attach(model, bundle, prefill_chunk=64):
        cache = KVCarCache(bundle)
        first = model.generate(ids[:, :128], past_key_values=cache, max_new_tokens=1, do_sample=False)
        again = torch.cat([ids[:, :128], first[:, 128:], ids[:, 128:]], 1)
        out = model.generate(again, past_key_values=cache, max_new_tokens=4, do_sample=False)
        whole = model.generate(again, past_key_values=KVCarCache(bundle), max_new_tokens=4, do_sample=False)
    assert torch.equal(out, whole)


@pytest.mark.parametrize("window", [0, 32, 64])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3"])
def test_left_padding_changes_nothing(family, window):
    """Each row of a padded batch must read as the same sequence alone, also when padding fills whole pages."""
    model = tiny_model(family)
    bundle = fitted(model, bits=8)
    lengths = [150, 149, 101, 37, 3]
    rows = [token_ids(n, seed=n) for n in lengths]
    longest = max(lengths)
    padded = torch.cat([torch.cat([torch.zeros(1, longest - r.shape[1], dtype=torch.int64), r], 1) for r in rows])
    mask = (torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]).long()
    with kvcar.attach(model, bundle, window=window, prefill_chunk=1024):
        batch = model.generate(padded, attention_mask=mask, max_new_tokens=40, do_sample=False, output_logits=True,
                               return_dict_in_generate=True)  # fmt: skip
        for index, row in enumerate(rows):
            alone = model.generate(
                row, max_new_tokens=40, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
            # Pages fill at other tokens when there is padding, so the window differs by less than a page; where
            # nothing is coded yet, or everything is, the logits must agree.
            if window == 0 or lengths[index] + 40 <= window:
                for a, b in zip(batch.logits, alone.logits, strict=True):
                    # Another order of sums may round a latent to the neighbouring code now and then.
                    assert (a[index] - b[0]).abs().mean() < 2e-2
        assert torch.isfinite(torch.stack(batch.logits)).all()


def test_lossless_pages_with_padding_are_the_full_cache():
    model = tiny_model("llama")
    bundle = fitted(model, codec="identity")
    lengths = torch.tensor([150, 90, 40])
    padded = token_ids(150, batch=3)
    mask = (torch.arange(150) >= 150 - lengths[:, None]).long()
    padded = padded * mask
    expected = model.generate(padded, attention_mask=mask, max_new_tokens=70, do_sample=False)
    with kvcar.attach(model, bundle, prefill_chunk=32):
        got = model.generate(padded, attention_mask=mask, max_new_tokens=70, do_sample=False)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
def test_beam_search_over_lossless_pages_is_the_models_own(options):
    model = tiny_model("llama")
    expected = model.generate(token_ids(70), max_new_tokens=40, do_sample=False, **options)
    with kvcar.attach(model, fitted(model, codec="identity")):
        got = model.generate(token_ids(70), max_new_tokens=40, do_sample=False, **options)
    assert torch.equal(got, expected)


def test_crop_takes_back_tokens_from_window_and_pages():
    model = tiny_model("llama")
    bundle = fitted(model, codec="identity")
    ids, other = token_ids(200), token_ids(60, seed=5)
    with kvcar.attach(model, bundle):
        for kept in (190, 150, 101, 7):
            cache, fresh = KVCarCache(bundle), KVCarCache(bundle)
            fill(model, cache, ids)
            cache.crop(kept - 200)
            assert cache.get_seq_length() == kept
            fill(model, fresh, ids[:, :kept])
            torch.testing.assert_close(fill(model, cache, other), fill(model, fresh, other), atol=1e-4, rtol=1e-4)


def test_crop_takes_a_number_that_is_a_tensor(llama):
    """As assisted generation of transformers computes it."""
    model, bundle = llama
    with kvcar.attach(model, bundle) as attachment:
        cache = attachment.new_cache()
        fill(model, cache, token_ids(150))
        cache.crop(torch.tensor(-20))
        assert type(cache.get_seq_length()) is int
        assert cache.get_seq_length() == 130
        assert step(model, cache, token_ids(1)).isfinite().all()


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_reset_lets_a_cache_be_used_again(family):
    model = tiny_model(family)
    bundle = fitted(model, page_tokens=32)
    with kvcar.attach(model, bundle):
        cache = KVCarCache(bundle)
        first = fill(model, cache, token_ids(130))
        fill(model, cache, token_ids(50, seed=3))
        cache.reset()
        assert cache.get_seq_length() == 0
        assert torch.equal(fill(model, cache, token_ids(130)), first)
        cache.reset()
        assert fill(model, cache, token_ids(130, batch=2)).shape[0] == 2


def test_window_zero_codes_every_past_token(llama):
    model, bundle = llama
    ids = token_ids(50)
    with kvcar.attach(model, bundle):
        cache, full = KVCarCache(bundle, window=0), DynamicCache(config=model.config)
        parts = list(ids.split(1, dim=1))
        got = torch.cat([step(model, cache, p) for p in parts], 1)
        expected = torch.cat([step(model, full, p) for p in parts], 1)
    error = (got - expected).abs().mean((0, 2))
    assert error[:4].max() < 0.01, "the first tokens are sinks, exact but for bfloat16"
    assert error[10:].min() > 0.02, "later ones are coded though no page is full"
    assert cache._pages.tokens == 50


def test_how_tokens_arrive_does_not_change_what_is_stored():
    """Fed one by one or in chunks of a page, lossless pages hold the same tokens in the same places."""
    model = tiny_model("llama")
    bundle = fitted(model, codec="identity")
    ids = token_ids(140)
    with kvcar.attach(model, bundle):
        stores = []
        for chunk in (1, 32, 45):
            cache = KVCarCache(bundle)
            fill(model, cache, ids, chunk)
            stores.append(cache)
        first = stores[0]
        for cache in stores[1:]:
            assert cache._pages.tokens == first._pages.tokens == 96
            for a, b in zip(cache._pages.arenas, first._pages.arenas, strict=True):
                torch.testing.assert_close(a.view(torch.float32), b.view(torch.float32), atol=1e-4, rtol=1e-4)


def test_several_models_attached_at_once(llama):
    model, bundle = llama
    other = tiny_model("gpt2")
    other_bundle = fitted(other, bits=4)
    ids = token_ids(120)
    with kvcar.attach(model, bundle):
        alone = model.generate(ids, max_new_tokens=6, do_sample=False)
    with kvcar.attach(other, other_bundle):
        other_alone = other.generate(ids, max_new_tokens=6, do_sample=False)
    with kvcar.attach(model, bundle), kvcar.attach(other, other_bundle):
        a, b = KVCarCache(bundle), KVCarCache(other_bundle)
        for part in ids.split(50, dim=1):  # interleaved
            step(model, a, part)
            step(other, b, part)
        assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), alone)
        assert torch.equal(other.generate(ids, max_new_tokens=6, do_sample=False), other_alone)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_detaching_restores_the_model(implementation):
    model = tiny_model("llama")
    model.set_attn_implementation(implementation)
    ids = token_ids(100)
    before_logits, before_state = model(ids).logits, set(model.__dict__)
    attachment = kvcar.attach(model, fitted(model, bits=2))
    model.generate(ids, max_new_tokens=3, do_sample=False)
    assert model.config._attn_implementation == f"kvcar_{implementation}"
    kvcar.detach(model)
    assert model.config._attn_implementation == implementation
    assert set(model.__dict__) == before_state
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(model(ids).logits, before_logits)
    attachment.detach()  # a second time is harmless
    with pytest.raises(AttachError, match="nothing to detach"):
        kvcar.detach(model)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert torch.equal(copied(ids).logits, before_logits)


def test_attaching_twice_is_refused(llama):
    model, bundle = llama
    with kvcar.attach(model, bundle), pytest.raises(AttachError, match="attached already"):
        kvcar.attach(model, bundle)
    with kvcar.attach(model, bundle):
        pass  # and after detaching it works again


def test_a_cache_refuses_a_model_that_is_not_attached(llama):
    model, bundle = llama
    with pytest.raises(AttachError, match=r"kvcar\.attach"):
        model(token_ids(5), past_key_values=KVCarCache(bundle))


def test_a_cache_of_another_models_bundle_is_refused(llama):
    model, bundle = llama
    other = fitted(tiny_model("llama", seed=1), bits=4)
    with kvcar.attach(model, bundle), pytest.raises(ModelMismatchError, match="sampled weights differ"):
        step(model, KVCarCache(other), token_ids(5))


def test_a_prompt_beyond_the_models_positions_is_refused_and_loses_nothing(llama):
    model, bundle = llama
    with kvcar.attach(model, bundle):
        cache = KVCarCache(bundle)
        fill(model, cache, token_ids(500))
        with pytest.raises(CacheStateError, match="512 positions"):
            step(model, cache, token_ids(13))
        assert cache.get_seq_length() == 500
        step(model, cache, token_ids(12))


def test_an_interrupted_pass_is_rolled_back(llama):
    model, bundle = llama
    ids = token_ids(140)
    with kvcar.attach(model, bundle):
        cache, clean = KVCarCache(bundle), KVCarCache(bundle)
        fill(model, cache, ids[:, :100])
        fill(model, clean, ids[:, :100])
        handle = model.model.layers[2].register_forward_pre_hook(_interrupt)
        with pytest.raises(KeyboardInterrupt):
            step(model, cache, ids[:, 100:])
        handle.remove()
        assert torch.equal(step(model, cache, ids[:, 100:]), step(model, clean, ids[:, 100:]))


def _interrupt(module, args):
    raise KeyboardInterrupt


def test_nan_is_refused_not_stored(llama):
    model, bundle = llama
    with kvcar.attach(model, bundle):
        cache = KVCarCache(bundle)
        handle = model.model.layers[1].self_attn.v_proj.register_forward_hook(lambda m, a, out: out * torch.nan)
        with pytest.raises(CacheStateError, match=r"values of layer 1 hold NaN"):
            fill(model, cache, token_ids(100))
        handle.remove()
        assert cache.tokens == 0
        fill(model, cache, token_ids(100))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.tensor([[1, 1, 0, 1]]), "left padding only"),
        (torch.tensor([[1, 1, 1, 0]]), "left padding only"),
        (torch.ones(1, 3, dtype=torch.int64), "2-D mask over all"),
    ],
)
def test_masks_that_are_not_left_padding_are_refused(llama, mask, message):
    model, bundle = llama
    with kvcar.attach(model, bundle), pytest.raises(InputError, match=message):
        step(model, KVCarCache(bundle), token_ids(4), attention_mask=mask)


def test_changing_batch_or_padding_midway_is_refused(llama):
    model, bundle = llama
    with kvcar.attach(model, bundle):
        cache = KVCarCache(bundle)
        step(model, cache, token_ids(8))
        with pytest.raises(CacheStateError, match="1 sequences"):
            step(model, cache, token_ids(1, batch=2))
        mask = torch.ones(1, 9, dtype=torch.int64)
        mask[:, :2] = 0
        with pytest.raises(InputError, match="differently"):
            step(model, cache, token_ids(1), attention_mask=mask)
        with pytest.raises(CacheStateError, match="stopped"):
            step(model, cache, token_ids(1), position_ids=torch.tensor([[20]]))
        with pytest.raises(CacheStateError, match="rise by one"):
            step(model, KVCarCache(bundle), token_ids(3), position_ids=torch.tensor([[0, 2, 3]]))


def test_what_attention_cannot_honour_is_refused(llama):
    model, bundle = llama
    with kvcar.attach(model, bundle):
        with pytest.raises(UnsupportedModelError, match="not that of causal"):
            step(model, KVCarCache(bundle), token_ids(4), attention_mask=torch.zeros(1, 1, 4, 4))
        model.train()
        with pytest.raises(UnsupportedModelError, match=r"model\.eval"):
            model(token_ids(4), past_key_values=KVCarCache(bundle))
        model.eval()


@pytest.mark.parametrize("window", [-32, 16, 33])
def test_a_window_that_is_no_multiple_of_a_page_is_refused(llama, window):
    model, bundle = llama
    with pytest.raises(InputError, match="multiple of the page size, 32"):
        KVCarCache(bundle, window=window)
    with pytest.raises(InputError, match="multiple of the page size"):
        kvcar.attach(model, bundle, window=window)
    step(model, None, token_ids(3))  # the failed attach left nothing behind
    assert model.config._attn_implementation == "sdpa"


def test_partly_coded_layers_and_layers_left_alone():
    model = tiny_model("llama")
    bundle = by_hand(model, [tuple(Slot(1, h, "key") for h in (0, 1)), (Slot(3, 1, "value"),)], bits=8)
    with kvcar.attach(model, bundle):
        cache = KVCarCache(bundle)
        got = fill(model, cache, token_ids(200))
        expected = fill(model, DynamicCache(config=model.config), token_ids(200))
    assert (got - expected).abs().mean() < 0.05 * expected.abs().mean()
    assert cache.stored_bytes_by_part()["plain"] == 2 * 2 * 2 * 200 * 16 * 4


def test_a_checkpoints_own_cache_preference_does_not_switch_compression_off(llama):
    model, bundle = llama
    model.generation_config.cache_implementation = "static"
    try:
        with kvcar.attach(model, bundle):
            out = model.generate(token_ids(40), max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
            assert isinstance(out.past_key_values, KVCarCache)
    finally:
        model.generation_config.cache_implementation = None
    with kvcar.attach(model, bundle):
        asked = model.generate(
            token_ids(40),
            max_new_tokens=3,
            do_sample=False,
            return_dict_in_generate=True,
            cache_implementation="static",
        )
        assert not isinstance(asked.past_key_values, KVCarCache)


def test_embeddings_instead_of_ids(llama):
    model, bundle = llama
    ids = token_ids(150)
    with kvcar.attach(model, bundle, prefill_chunk=1024):
        expected = model.generate(ids, max_new_tokens=6, do_sample=False)[:, 150:]
        got = model.generate(inputs_embeds=model.get_input_embeddings()(ids), max_new_tokens=6, do_sample=False)
    assert torch.equal(got, expected)


def test_outside_no_grad_nothing_of_the_graph_is_kept(llama):
    model, bundle = llama
    with kvcar.attach(model, bundle):
        cache = KVCarCache(bundle)
        for part in token_ids(140).split(70, dim=1):
            model(part, past_key_values=cache)
        tensors = [*cache._pages.arenas, *(b for layer in cache.layers for b in layer.buffers)]
        assert not any(t.requires_grad for t in tensors)
