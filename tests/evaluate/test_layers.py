"""What each block costs on a text adds up to what its pages cost as they are coded."""

from dataclasses import replace

import pytest
import torch
from bundles import fitted
from tiny import tiny_model, token_ids

import kvcar
from kvcar.cache.cache import KVCarCache
from kvcar.errors import InputError
from kvcar.evaluate.layers import BlockCost, block_costs


@pytest.fixture(scope="module")
def judged():
    model = tiny_model("llama")
    return model, fitted(
        model, codec="linear8", metric="effect", bits=2, layers_per_block=2, window=0, max_page_cost=1e9
    )


def test_blocks_cost_together_what_pages_do(judged):
    model, bundle = judged
    ids, costs = token_ids(160, seed=3), []
    with kvcar.attach(model, bundle):
        cache = KVCarCache(bundle)
        cache.page_costs = costs
        with torch.no_grad():
            model(input_ids=ids, past_key_values=cache)
        found = block_costs(model, bundle, ids)
    expected = float(torch.stack(costs).sum()) * 32 / (160 - bundle.plan.sinks)
    assert len(costs) == 5
    assert len(found) > 1, "blocks to tell apart"
    assert sum(each.nats for each in found) == pytest.approx(expected, rel=2e-3)
    assert sum(each.share for each in found) == pytest.approx(1)
    assert [each.nats for each in found] == sorted((each.nats for each in found), reverse=True)
    assert {layer for each in found for layer in each.layers} == set(range(4))
    assert block_costs(model, bundle, ids) == found, "not attached, and tokens that fill no page are left out"
    assert block_costs(model, bundle, torch.cat([ids, ids[:, :9]], 1)) == found


def test_a_block_that_is_worse_is_named_first(judged):
    model, bundle = judged
    ids = token_ids(160, seed=3)
    last = block_costs(model, bundle, ids)[-1]
    place = next(
        i for i, block in enumerate(bundle.plan.blocks) if tuple(sorted({s.layer for s in block.slots})) == last.layers
        and tuple(sorted({s.kind for s in block.slots})) == last.kinds
    )  # fmt: skip
    coded = bundle.blocks[place]
    assert "quantizer.scale" in coded.tensors()
    tensors = {name: t * (40 if name == "quantizer.scale" else 1) for name, t in coded.tensors().items()}
    worse = type(coded).from_tensors(tensors, bundle.plan.blocks[place], bundle.plan)
    blocks = (*bundle.blocks[:place], worse, *bundle.blocks[place + 1 :])
    first = block_costs(model, replace(bundle, blocks=blocks), ids)[0]
    assert (first.layers, first.kinds) == (last.layers, last.kinds)


def test_codecs_that_do_not_know_say_nothing_and_too_little_text_is_refused(judged):
    model, bundle = judged
    assert block_costs(model, fitted(model, bits=3), token_ids(64)) == []
    with pytest.raises(InputError, match="needs 32 tokens at least, got 20"):
        block_costs(model, bundle, token_ids(20))


def test_blocks_are_named_in_words():
    assert str(BlockCost((3, 4, 5), ("key", "value"), 0.1, 0.384)) == "layers 3 to 5 38 %"
    assert str(BlockCost((7,), ("key",), 0.1, 0.2)) == "layer 7 (keys) 20 %"
