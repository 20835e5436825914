"""int8 on the latents: other bits, the same codecs, close to the same reconstruction."""

import pytest
import torch
from bundles import fitted
from tiny import tiny_model, token_ids

from kvcar.errors import InputError
from kvcar.paper.quantize import quantize_latents

WINDOWS = token_ids(128, batch=8, seed=3)


@pytest.mark.parametrize("layers_per_block", [1, 2])
@pytest.mark.parametrize("scales", ["static", "dynamic"])
def test_int8_keeps_the_codecs_and_costs_little(scales, layers_per_block):
    model = tiny_model("llama")
    before = fitted(model, key_latents=20, value_latents=24, latent_bits=16, layers_per_block=layers_per_block)
    after = quantize_latents(before, model, WINDOWS, 8, scales)
    assert {(b.groups[0].bits, b.scales, b.latents) for b in after.plan.blocks} == {
        (8, scales, b.latents) for b in before.plan.blocks
    }
    for old, new in zip(before.blocks, after.blocks, strict=True):
        x = torch.randn(50, old.codec.decode(torch.zeros(1, len(old.quantizer.scale))).shape[1])
        assert new.codec is old.codec
        change = (new.round_trip(x) - old.round_trip(x)).norm() / old.round_trip(x).norm()
        assert 0 < change < 0.2


def test_what_has_no_latents_is_refused():
    model = tiny_model("llama")
    with pytest.raises(InputError, match="1 to 8 bits, got 9"):
        quantize_latents(fitted(model, bits=4), model, WINDOWS, 9, "static")
    with pytest.raises(InputError, match="no latents"):
        quantize_latents(fitted(model, codec="identity"), model, WINDOWS, 8, "static")
    with pytest.raises(InputError, match="bits already"):
        quantize_latents(fitted(model, bits=4), model, WINDOWS, 8, "static")
