"""The parallel, differentiable pass gives what stepping through the real cache gives."""

import pytest
import torch
from bundles import by_hand, fitted
from tiny import tiny_model, token_ids

from kvcar.cache.attach import attach
from kvcar.cache.cache import KVCarCache
from kvcar.geometry import Slot
from kvcar.paper.simulate import LayerStack, Simulator, units_of
from kvcar.plan import Reuse


def stepped(model, bundle, ids, step):
    logits = []
    with attach(model, bundle), torch.no_grad():
        cache = KVCarCache(bundle, window=0)
        for start in range(0, ids.shape[1], step):
            logits.append(model(input_ids=ids[:, start : start + step], past_key_values=cache).logits)
    return torch.cat(logits, dim=1)


def simulated(model, bundle, ids, step, layers=None):
    units = units_of(bundle, torch.device("cpu"))
    with Simulator(model, bundle.plan, units, step) as simulator, simulator.compressing(layers), torch.no_grad():
        return simulator.logits(ids)


def layer_blocks(layers, heads=(0, 1)):
    return [tuple(Slot(n, h, kind) for h in heads) for n in layers for kind in ("key", "value")]


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gemma3", "mistral", "qwen2"])
@pytest.mark.parametrize("step", [1, 16])
def test_one_pass_equals_stepping(family, step):
    model = tiny_model(family)
    layers = [1, 3] if family == "gemma3" else [0, 1, 3]
    heads = tuple(range(4)) if family == "gpt2" else (0, 1)
    bundle = by_hand(model, layer_blocks(layers, heads), bits=4, window=0, exact_dtype="model")
    ids = token_ids(48, batch=2)
    expected = stepped(model, bundle, ids, step)
    # Rounding may fall to the other side of a code where float32 differs in the last bit; hence not tighter.
    torch.testing.assert_close(simulated(model, bundle, ids, step), expected, atol=2e-3, rtol=2e-3)
    with torch.no_grad():
        full = model(input_ids=ids).logits
    assert (full - expected).abs().max() > 0.02


@pytest.mark.parametrize("source_coded", [True, False])
def test_reuse_chains_equal_stepping(source_coded):
    model = tiny_model("llama")
    reuses = tuple(
        Reuse(slot=Slot(n, h, kind), source=Slot(n - 1, h, kind))
        for n in (1, 2)
        for h, kind in ((0, "key"), (1, "value"))
    )
    blocks = layer_blocks([0]) if source_coded else layer_blocks([3])
    bundle = by_hand(model, blocks, bits=5, reuses=reuses, window=0, exact_dtype="model")
    ids = token_ids(40)
    expected = stepped(model, bundle, ids, 1)
    torch.testing.assert_close(simulated(model, bundle, ids, 1), expected, atol=2e-3, rtol=2e-3)


def test_nothing_compressed_is_the_full_cache_and_the_model_is_restored():
    model = tiny_model("llama")
    bundle = fitted(model, bits=4, window=0)
    ids = token_ids(32)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        torch.testing.assert_close(simulated(model, bundle, ids, 1, ()), before)
        assert model.config._attn_implementation == "sdpa"
        assert torch.equal(model(input_ids=ids).logits, before)


def test_gradients_reach_every_unit_and_no_weight():
    model = tiny_model("llama").requires_grad_(False)
    bundle = fitted(model, bits=4, window=0)
    units = units_of(bundle, torch.device("cpu"))
    with Simulator(model, bundle.plan, units) as simulator, simulator.compressing():
        simulator.logits(token_ids(64)).square().mean().backward()
    for name, parameter in units.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_a_frozen_prefix_changes_nothing(family):
    model = tiny_model(family)
    stack = LayerStack(model)
    ids = token_ids(24, batch=2)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        first = stack.hidden(ids, 1)
        third = stack.hidden(ids, 3, (1, first))
        with stack.starting_at(3, third):
            torch.testing.assert_close(model(input_ids=ids).logits, expected)
        with stack.starting_at(4, stack.hidden(ids, 4)):
            torch.testing.assert_close(model(input_ids=ids).logits, expected)
        assert torch.equal(model(input_ids=ids).logits, expected)


def test_blocks_over_layers_are_refused():
    model = tiny_model("llama")
    bundle = fitted(model, bits=4, layers_per_block=2)
    with pytest.raises(Exception, match="within a layer"):
        Simulator(model, bundle.plan, {})
