"""The full cache that holds bfloat16 under a model in float32."""

import pytest
import torch
from bundles import by_hand
from tiny import tiny_model, token_ids
from transformers import DynamicCache

from kvcar.cache.attach import attach
from kvcar.evaluate.memory import Bfloat16Cache, keep_in_bfloat16, kept_bytes
from kvcar.geometry import Slot


@torch.no_grad()
def logits(model, cache, ids, sizes):
    return torch.cat([model(input_ids=part, past_key_values=cache).logits for part in ids.split(sizes, dim=1)], dim=1)


def tensor_bytes(cache):
    return sum(side.untyped_storage().nbytes() for layer in cache.layers for side in (layer.keys, layer.values))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_it_differs_from_the_full_cache_by_rounding_alone(family):
    model, ids = tiny_model(family), token_ids(150, batch=2)
    cache = Bfloat16Cache(model.config)
    expected = logits(model, DynamicCache(config=model.config), ids, [100, 1, 49])
    assert torch.allclose(logits(model, cache, ids, [100, 1, 49]), expected, atol=0.2)
    assert {side.dtype for layer in cache.layers for side in (layer.keys, layer.values)} == {torch.bfloat16}
    assert cache.get_seq_length() == 150


def test_its_room_is_less_than_a_step_larger_than_what_it_holds():
    model = tiny_model("llama")
    cache = Bfloat16Cache(model.config)
    logits(model, cache, token_ids(129, batch=2), [64, 64, 1])
    assert kept_bytes(cache) == 129 * 2 * 4 * 2 * 2 * 16 * 2
    assert tensor_bytes(cache) == 192 * 2 * 4 * 2 * 2 * 16 * 2


def test_sequences_can_be_picked_and_tokens_removed():
    model, ids = tiny_model("llama"), token_ids(80, batch=2)
    cache, alone = Bfloat16Cache(model.config), Bfloat16Cache(model.config)
    logits(model, cache, ids, [60, 20])
    cache.crop(-20)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_select_indices(slice(0, 1))
    logits(model, alone, ids[1:], [60, 20])
    found = logits(model, cache, ids[1:, 60:], [20])
    alone.crop(-20)
    expected = logits(model, alone, ids[1:, 60:], [20])
    assert torch.allclose(found, expected, atol=1e-5)
    cache.reset()
    assert cache.get_seq_length() == 0
    again, expected = (logits(model, each, ids[:, :60], [60]) for each in (cache, Bfloat16Cache(model.config)))
    assert torch.allclose(again, expected)


def test_layers_that_a_bundle_does_not_code_hold_bfloat16_too():
    model, ids = tiny_model("llama"), token_ids(128)
    blocks = [tuple(Slot(1, head, kind) for head in (0, 1)) for kind in ("key", "value")]
    bundle = by_hand(model, blocks, bits=8, window=0)
    with attach(model, bundle) as attachment:
        wide, narrow = attachment.new_cache(), attachment.new_cache()
        keep_in_bfloat16(narrow)
        a, b = (logits(model, cache, ids, [64, 64]) for cache in (wide, narrow))
    assert torch.allclose(a, b, atol=0.2)
    plain = [cache.stored_bytes_by_part()["plain"] for cache in (wide, narrow)]
    assert plain[0] == 2 * plain[1] == 3 * 128 * 2 * 2 * 16 * 4
