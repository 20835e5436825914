"""Families of models as people run them: what their layers keep, that lossless pages change nothing, that codes come close."""

import pytest
import torch
from families import LARGEST_KL, LOSSLESS_NOISE, family
from tiny import tiny_model
from tiny_families import tiny_family
from transformers import DynamicCache, StaticCache

import kvcar
from kvcar.cache.layer import CodedStateLayer
from kvcar.errors import CacheStateError, UnsupportedModelError
from kvcar.models.geometry import geometry_of
from kvcar.models.structure import find_decoder

# (name, layers coded, sliding and exact, growing but not coded, of another kind)
FAMILIES = [
    ("qwen3_moe", 4, 0, 0, 0),
    ("gpt_oss", 2, 2, 0, 0),
    ("gemma2", 2, 2, 0, 0),
    ("gemma3n_text", 2, 2, 0, 2),
    ("gemma4_text", 2, 2, 0, 2),
    ("llama4_text", 2, 2, 0, 0),
    ("qwen3_next", 2, 0, 0, 2),
    ("lfm2", 2, 0, 0, 2),
    ("granitemoehybrid", 2, 0, 0, 2),
    ("nemotron_h", 2, 0, 0, 4),
    ("falcon_h1", 4, 0, 0, 0),
    ("bart", 4, 0, 0, 0),
]


@pytest.mark.parametrize(("name", "coded", "sliding", "growing", "other"), FAMILIES, ids=[f[0] for f in FAMILIES])
def test_a_family_works(name, coded, sliding, growing, other):
    found = family(name)
    assert found["result"] == "works", found
    assert list(found["layers"].values()) == [coded, sliding, growing, other]
    assert found["lossless_error"] <= LOSSLESS_NOISE
    assert found["kl"] <= LARGEST_KL


@pytest.mark.parametrize("name", ["qwen3_next", "glm4", "lfm2"])
def test_rotations_are_found_though_other_layers_tell_equal_tokens_apart(name):
    model = tiny_family(name)
    with kvcar.attach(model, kvcar.lossless(model)) as attached:
        assert set(attached._rotations) == set(geometry_of(model).codable_layers)


def test_latents_in_place_of_keys_and_values_are_refused_before_a_fit():
    with pytest.raises(UnsupportedModelError, match="holds latents in place of keys and values"):
        geometry_of(tiny_family("deepseek_v3"))


def test_attention_out_of_reach_is_refused_with_the_reason():
    with pytest.raises(UnsupportedModelError, match="computes attention in its own code instead of by name"):
        geometry_of(tiny_family("bloom"))


def test_layers_that_read_the_keys_of_others_are_found():
    parts = find_decoder(tiny_family("gemma3n_text"))
    assert sorted(layer for layers in parts.readers.values() for layer in layers) == [0, 1, 2, 2, 3, 3]
    assert set(parts.attention) == {0, 1, 2, 3}


def test_heads_of_another_shape_stay_the_models_own():
    geometry = geometry_of(tiny_family("gemma4_text"))
    assert geometry.head_dim == 32
    assert geometry.layer_elements == (2 * 2 * 16, 2 * 2 * 32) * 2 + (0, 0)
    assert geometry.full_bytes(10) == 2 * 10 * (2 * 64 + 2 * 128)


@pytest.mark.parametrize("name", ["qwen3_next", "falcon_h1"])
def test_a_cache_with_states_forks_reorders_and_refuses_to_go_back(name):
    model = tiny_family(name)
    ids = torch.randint(3, 100, (2, 90), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), kvcar.attach(model, kvcar.lossless(model, window=0)) as attached:
        cache, own = attached.new_cache(), DynamicCache(config=model.config)
        model(input_ids=ids, past_key_values=cache)
        own_logits = model(input_ids=ids, past_key_values=own).logits
        assert own_logits.isfinite().all()
        fork = cache.fork()
        swapped = torch.tensor([1, 0])
        fork.reorder_cache(swapped)
        own.reorder_cache(swapped)
        step = ids[:, :1]
        expected = model(input_ids=step, past_key_values=own).logits
        assert torch.allclose(model(input_ids=step, past_key_values=fork).logits, expected, atol=1e-3)
        # What happened to the fork did not happen to the cache that it came from.
        again = model(input_ids=step, past_key_values=cache).logits
        assert torch.allclose(
            again,
            model(input_ids=step.flip(0), past_key_values=_swapped(attached, model, ids)).logits.flip(0),
            atol=1e-3,
        )
        with pytest.raises(CacheStateError, match="keep a state"):
            cache.crop(-1)
        if name == "falcon_h1":
            assert all(isinstance(layer, CodedStateLayer) for layer in cache.layers)


def _swapped(attached, model, ids):
    cache = attached.new_cache()
    model(input_ids=ids.flip(0), past_key_values=cache)
    return cache


def test_a_wrapper_that_makes_masks_for_its_decoder_is_read():
    model = tiny_family("gemma3")
    ids = torch.randint(3, 100, (2, 50), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask, past_key_values=DynamicCache(config=model.config)).logits
        with kvcar.attach(model, kvcar.lossless(model)) as attached:
            got = model(input_ids=ids, attention_mask=mask, past_key_values=attached.new_cache()).logits
    assert torch.allclose(got[mask.bool()], expected[mask.bool()], atol=1e-3)


def test_tokens_that_see_later_ones_are_refused():
    model = tiny_family("gemma3")
    ids = torch.randint(3, 100, (1, 20))
    images = torch.zeros_like(ids)
    images[:, 3:7] = 1
    with torch.no_grad(), kvcar.attach(model, kvcar.lossless(model)) as attached, pytest.raises(UnsupportedModelError):
        model(input_ids=ids, token_type_ids=images, past_key_values=attached.new_cache())


# A window of 512 tokens is coded, where all layers have heads alike.
ALIKE = {"sliding_window": 512, "global_head_dim": 16, "num_global_key_value_heads": 2}
REQUESTS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 4},
}


@pytest.mark.parametrize("own_cache", [False, True], ids=["compressed", "its own cache while attached"])
@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
@pytest.mark.parametrize("overrides", [{}, ALIKE], ids=["heads differ", "windows coded"])
@pytest.mark.parametrize("padding", [0, 37])
def test_layers_that_are_asked_for_the_last_tokens_alone(overrides, request_, padding, own_cache):
    # Gemma 4 computes no others in layers that read the keys of earlier ones.
    lookup = "prompt_lookup_num_tokens" in request_
    if lookup and not hasattr(DynamicCache, "activate_past_recording"):
        pytest.skip("this version of transformers takes no tokens back from a sliding window")
    model, batch = tiny_family("gemma4_text", **overrides), 1 if lookup else 2
    ids = torch.randint(20, 150, (batch, 300), generator=torch.Generator().manual_seed(1)).repeat(1, 2)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    given = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "eos_token_id": 3, "pad_token_id": 0}
    expected = model.generate(ids, **given, **request_)
    with kvcar.attach(model, kvcar.lossless(model, window=0), prefill_chunk=250):
        cache = {"past_key_values": DynamicCache(config=model.config)} if own_cache else {}
        assert torch.equal(model.generate(ids, **given, **request_, **cache), expected)


@pytest.mark.parametrize("name", ["gemma3n_text", "gemma4_text"])
def test_compiled_layers_that_read_the_keys_of_others(name):
    torch._dynamo.reset()
    model = tiny_family(name)
    ids = torch.randint(20, 150, (2, 100), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), kvcar.attach(model, kvcar.lossless(model, window=0)) as attached:
        compiled, cache, own = (
            torch.compile(model, backend="eager"),
            attached.new_cache(),
            DynamicCache(config=model.config),
        )
        for part in ids.split([70, 1, 29], dim=1):
            got = compiled(input_ids=part, past_key_values=cache).logits
            assert torch.allclose(got, model(input_ids=part, past_key_values=own).logits, atol=1e-3)


@pytest.mark.parametrize("name", ["llama", "gemma3n_text", "gemma4_text"])
def test_a_static_cache_is_as_without_kvcar(name):
    model = tiny_model("llama") if name == "llama" else tiny_family(name)
    ids = torch.randint(20, 100, (2, 60), generator=torch.Generator().manual_seed(1))

    def passes():
        cache = StaticCache(config=model.config, max_cache_len=100)
        return [model(part, past_key_values=cache).logits for part in ids.split([40, 1, 19], dim=1)]

    with torch.no_grad():
        expected = passes()
        with kvcar.attach(model, kvcar.lossless(model)):
            torch.testing.assert_close(passes(), expected)
