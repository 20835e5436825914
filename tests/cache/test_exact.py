"""What is kept exactly is: sinks and windows of 16 bits an element, or of the model's own where keys are large."""

import pytest
import torch
from bundles import fitted
from tiny import tiny_model, token_ids
from transformers import DynamicCache

import kvcar
from kvcar.evaluate.fidelity import measure_fidelity
from kvcar.geometry import BFLOAT16_BYTES
from kvcar.plan import Plan
from kvcar.sizes import stored_bytes


def with_large_biases(dtype=torch.float32):
    """A model whose keys are as large as Qwen2's, of which attention sees only how they differ."""
    model = tiny_model("qwen2", dtype=dtype)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.bias.copy_(torch.linspace(-200, 200, layer.self_attn.k_proj.bias.numel()))
            layer.self_attn.q_proj.bias.zero_()
    return model


def test_sinks_and_window_of_a_model_with_large_keys_lose_nothing():
    model = with_large_biases()
    ids = token_ids(60)
    with torch.no_grad(), kvcar.attach(model, fitted(model, bits=8, window=64, page_tokens=64)) as attached:
        caches = attached.new_cache(), DynamicCache(config=model.config)
        got, expected = (
            torch.cat([model(part, past_key_values=cache).logits for part in ids.split(20, dim=1)], 1)
            for cache in caches
        )
    assert (got - expected).square().mean().sqrt() < 1e-4 * expected.std()


def test_large_keys_cost_no_more_with_a_window_than_without():
    model = with_large_biases()
    bundle, windows = fitted(model, codec="identity", bits=8), token_ids(256, batch=2)
    with kvcar.attach(model, bundle):
        caches = {str(window): lambda window=window: kvcar.KVCarCache(bundle, window) for window in (0, 32)}
        found = measure_fidelity(model, windows, caches)
    assert found["32"].kl_divergence.value < 1.1 * found["0"].kl_divergence.value


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16", "float16"])
def test_what_is_exact_takes_16_bits_in_coded_layers_and_layers_left_alone_are_the_models_own(dtype):
    model = tiny_model("llama", dtype=dtype)
    bundle = fitted(tiny_model("llama"), bits=4, layers=(1, 2))
    assert bundle.plan.exact_dtype == "float16"
    with torch.no_grad(), kvcar.attach(model, bundle) as attached:
        cache = attached.new_cache()
        model(token_ids(200), past_key_values=cache)
    assert cache._coded[1].buffers[0].dtype == (torch.float16 if dtype == torch.float32 else dtype)
    narrow = stored_bytes(bundle.plan, 200, BFLOAT16_BYTES)
    assert cache.stored_bytes() == stored_bytes(bundle.plan, 200, dtype.itemsize)
    assert cache.stored_bytes(in_bfloat16=True) == narrow
    assert (cache.stored_bytes() > narrow) == (dtype == torch.float32)


def test_large_keys_are_kept_in_the_models_own_dtype_and_compared_as_in_16_bits():
    model = with_large_biases()
    bundle = fitted(model, bits=4)
    assert bundle.plan.exact_dtype == "model" == Plan(geometry=bundle.plan.geometry).exact_dtype
    with torch.no_grad(), kvcar.attach(model, bundle) as attached:
        cache = attached.new_cache()
        model(token_ids(200), past_key_values=cache)
    assert cache.stored_bytes() == stored_bytes(bundle.plan, 200, 4)
    assert cache.stored_bytes(in_bfloat16=True) == stored_bytes(bundle.plan, 200, 2) < cache.stored_bytes()
