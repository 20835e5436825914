"""The paper's dynamic int8, and what it becomes in pages."""

import pytest
import torch
from bundles import fitted
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tiny import tiny_model, token_ids

from kvcar.cache.attach import attach
from kvcar.cache.cache import KVCarCache
from kvcar.codecs import DynamicQuantizer
from kvcar.geometry import Slot
from kvcar.plan import BitGroup, Block

SLOT = (Slot(0, 0, "key"),)


def test_it_is_the_paper_s_formula_where_the_range_holds_0():
    x = torch.randn(50, 24, generator=torch.Generator().manual_seed(0)) * 3
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale = 255 / (high - low)
    zero_point = -(scale * low).round() - 128
    q = (scale * x + zero_point).round()
    expected = (q - zero_point) / scale
    quantizer = DynamicQuantizer(8)
    u = quantizer.codes(x)
    # Steps are stored in float16, so codes may differ by one where the paper's lies half way.
    torch.testing.assert_close(u[:, 2:] - 128, q, atol=1.0, rtol=0)
    torch.testing.assert_close(u[:, 1:2] - 128, zero_point, atol=1.0, rtol=0)
    torch.testing.assert_close(quantizer.latents(u), expected, atol=float(1.1 / scale.min()), rtol=0)


@settings(max_examples=60, deadline=None)
@given(
    bits=st.integers(1, 8),
    count=st.integers(1, 40),
    size=st.floats(1e-3, 1e3),
    shift=st.floats(-20, 20),
    seed=st.integers(0, 999),
)
def test_no_latent_is_off_by_more_than_a_step(bits, count, size, shift, seed):
    x = (torch.randn(7, count, generator=torch.Generator().manual_seed(seed)) + shift) * size
    quantizer = DynamicQuantizer(bits)
    u = quantizer.codes(x)
    assert u.shape == (7, count + 2)
    assert torch.equal(u.to(torch.float16).float(), u), "pages hold them exactly"
    codes = u[:, 2:]
    assert torch.equal(codes, codes.round())
    assert codes.min() >= 0
    assert codes.max() <= 2**bits - 1
    # Half a step for rounding, half for the rounded zero point, and the float16 step's own error over the range.
    assert ((quantizer.latents(u) - x).abs() <= u[:, :1] * (1.001 + 2**bits * 2.0**-11)).all()


def test_dynamic_scales_need_equal_bits():
    with pytest.raises(ValidationError, match="same 1 to 8 bits"):
        Block(
            codec="linear", slots=SLOT, groups=(BitGroup(bits=8, count=2), BitGroup(bits=4, count=2)), scales="dynamic"
        )
    with pytest.raises(ValidationError, match="same 1 to 8 bits"):
        Block(codec="linear", slots=SLOT, groups=(BitGroup(bits=16, count=2),), scales="dynamic")
    block = Block(codec="linear", slots=SLOT, groups=(BitGroup(bits=8, count=10),), scales="dynamic")
    assert block.bits_per_token == 8 * 10 + 2 * 16


@pytest.mark.parametrize("codec", ["linear", "autoencoder"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_dynamic_cache_is_close_to_an_unquantised_one_and_grows_token_by_token(codec, family):
    model = tiny_model(family)
    given = {"codec": codec, "key_latents": 24, "value_latents": 28, "window": 0, "steps": 0}
    logits = {}
    for name, more in (("raw", {"latent_bits": 16}), ("int8", {"latent_bits": 8, "scales": "dynamic"})):
        bundle = fitted(model, **given, **more)
        with attach(model, bundle), torch.no_grad():
            cache = KVCarCache(bundle)
            steps = [model(input_ids=ids[None], past_key_values=cache).logits for ids in token_ids(50)[0].split(7)]
        logits[name] = torch.cat(steps, dim=1)
    with torch.no_grad():
        full = model(input_ids=token_ids(50)).logits
    assert (logits["int8"] - logits["raw"]).abs().mean() < 0.15 * (full - logits["raw"]).abs().mean()
