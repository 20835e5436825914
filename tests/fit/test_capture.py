"""What capture hands out is what the model really computes, keys before RoPE."""

import pytest
import torch
from tiny import FAMILIES, tiny_model, token_ids
from transformers import AutoModelForCausalLM, BloomConfig, DynamicCache

from kvcar.errors import FitError, InputError, UnsupportedModelError
from kvcar.fit.capture import capture
from kvcar.fit.fit import fit_bundles
from kvcar.fit.options import FitOptions, Structure
from kvcar.fit.partition import regular_blocks
from kvcar.models.geometry import read_geometry
from kvcar.text import TextSource

SOURCE = TextSource("none", "none", "0" * 64)


def fit_bundle(model, windows, **structure):
    return next(fit_bundles(model, windows, [FitOptions(structure=Structure(**structure))], SOURCE, "tiny"))


def collect(model, blocks, windows, sinks=4):
    geometry = read_geometry(model.config)
    seen = [[] for _ in blocks]
    counts = list(capture(model, geometry, windows, blocks, sinks, lambda i, x: seen[i].append(x)))
    return [torch.cat(parts) for parts in seen], counts


@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_keys_are_the_models_own(family):
    model = tiny_model(family)
    geometry = read_geometry(model.config)
    windows = token_ids(40, batch=2)
    blocks = regular_blocks(geometry, len(geometry.codable_layers), None)
    (keys, values), counts = collect(model, blocks, windows)
    assert counts == [36, 36]
    width = geometry.kv_heads * geometry.head_dim
    assert keys.shape == values.shape == (72, len(geometry.codable_layers) * width)
    layer = geometry.codable_layers[1]
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(windows[:1], past_key_values=cache)
    own = cache.layers[layer].values[0, :, 4:].transpose(0, 1).flatten(1)
    torch.testing.assert_close(values[:36, width : 2 * width], own)
    if not geometry.rotary:
        own_keys = cache.layers[layer].keys[0, :, 4:].transpose(0, 1).flatten(1)
        torch.testing.assert_close(keys[:36, width : 2 * width], own_keys)


def test_keys_come_before_rope_where_the_projection_is_all_there_is():
    model = tiny_model("llama")
    projected = []
    handle = model.model.layers[2].self_attn.k_proj.register_forward_hook(
        lambda m, a, out: projected.append(out[0, 4:])
    )
    (keys, _), _ = collect(model, regular_blocks(read_geometry(model.config), 4, None), token_ids(60))
    handle.remove()
    torch.testing.assert_close(keys[:, 64:96], projected[-1], atol=1e-5, rtol=1e-5)


def test_capture_leaves_no_hooks_behind():
    model = tiny_model("llama")
    blocks = regular_blocks(read_geometry(model.config), 1, None)
    collect(model, blocks, token_ids(20))
    next(capture(model, read_geometry(model.config), token_ids(20, batch=3), blocks, 4, lambda i, x: None))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_nan_in_the_weights_stops_the_fit():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[3, 5] = torch.nan
    with pytest.raises(UnsupportedModelError, match="computes NaN"):
        fit_bundle(model, token_ids(256, batch=2), bits=3)
    geometry = read_geometry(model.config)
    with pytest.raises(FitError, match="layer 1 computes NaN"):
        next(capture(model, geometry, token_ids(20, batch=3), regular_blocks(geometry, 1, None), 4, lambda i, x: None))


def test_too_little_text_is_refused():
    model = tiny_model("llama")
    with pytest.raises(FitError, match="56 tokens are too few to fit blocks of 32"):
        fit_bundle(model, token_ids(60), bits=3)
    with pytest.raises(InputError, match="windows of token ids"):
        fit_bundle(model, torch.zeros(0, 10, dtype=torch.int64))
    with pytest.raises(InputError, match="longer than the model's 512"):
        fit_bundle(model, token_ids(600))


def test_fits_repeat_and_share_a_pass_without_mixing():
    model = tiny_model("llama")
    windows = token_ids(256, batch=4)
    options = [
        FitOptions(structure=Structure(bits=3, layers_per_block=2)),
        FitOptions(structure=Structure(codec="autoencoder", bits=4, steps=3)),
        FitOptions(structure=Structure(codec="identity")),
    ]
    together = list(fit_bundles(model, windows, options))
    for bundle, option in zip(together[:2], options, strict=False):
        alone = next(fit_bundles(model, windows, [option]))
        assert alone.plan == bundle.plan
        if option.codec == "linear":
            for a, b in zip(alone.blocks, bundle.blocks, strict=True):
                assert torch.equal(a.codec.encoder, b.codec.encoder)
    again = list(fit_bundles(model, windows, options))
    for a, b in zip(together, again, strict=True):
        for x, y in zip(a.blocks, b.blocks, strict=True):
            assert all(torch.equal(x.tensors()[name], y.tensors()[name]) for name in x.tensors())


def test_bits_are_an_average_per_element():
    model = tiny_model("llama")
    for bits in (1.0, 2.5, 6.0):
        plan = fit_bundle(model, token_ids(256, batch=4), bits=bits, layers_per_block=4).plan
        spent = sum(block.bits_per_token for block in plan.blocks)
        assert spent == int(bits * 4 * 2 * 2 * 16)


def test_models_that_cannot_be_compressed_say_why():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(BloomConfig(hidden_size=64, n_layer=2, n_head=4, vocab_size=128)).eval()
    with pytest.raises(UnsupportedModelError, match="computes attention in its own code instead of by name"):
        fit_bundle(model, token_ids(256, batch=2))
    sliding = tiny_model("mistral", sliding_window=32)
    with pytest.raises(UnsupportedModelError, match="windows of fewer than 512 tokens are not compressed"):
        fit_bundle(sliding, token_ids(256, batch=2))
