"""Tuning codecs in two passes: better where there is something to gain, untouched where there is not."""

from dataclasses import replace

import pytest
import torch
from bundles import by_hand, fitted
from tiny import tiny_model, token_ids

from kvcar.bundle import CodedBlock
from kvcar.codecs import LinearCodec
from kvcar.errors import InputError
from kvcar.plan import Plan
from kvcar.shapes import Slot
from kvcar.train.distill import DistillOptions, distill
from kvcar.train.losses import kl_divergence
from kvcar.train.simulate import Simulator
from kvcar.train.two_pass import TwoPass

WINDOWS = token_ids(160, batch=6, seed=3)


def shrunk(bundle, factor):
    """The bundle with decoders that give back too little."""
    blocks = tuple(
        CodedBlock(LinearCodec(c.codec.mean, c.codec.encoder, factor * c.codec.decoder), c.quantizer)
        for c in bundle.blocks
    )
    return replace(bundle, blocks=blocks)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("trains", ["decoders", "all"])
def test_a_bad_start_gets_better(family, trains):
    model = tiny_model(family)
    start = shrunk(fitted(model, bits=4, layers_per_block=2), 0.7)
    options = DistillOptions(steps=24, learning_rate=3e-3, trains=trains, validate_every=8, patience=0)
    result = distill(model, start, WINDOWS, options)
    assert result.after < 0.95 * result.before
    assert result.bundle.plan == start.plan
    for before, after in zip(start.blocks, result.bundle.blocks, strict=True):
        assert torch.equal(before.codec.encoder, after.codec.encoder) == (trains == "decoders")
        assert torch.equal(before.quantizer.scale, after.quantizer.scale)
    assert all(p.requires_grad for p in model.parameters())
    assert model.config._attn_implementation == "sdpa"


def test_a_start_that_nothing_beats_comes_back_as_it_was():
    model = tiny_model("llama")
    start = fitted(model, bits=6)
    result = distill(model, start, WINDOWS, DistillOptions(steps=2, learning_rate=1.0))
    assert result.bundle is start
    assert result.after == result.before


def test_reading_what_was_never_coded_is_the_full_cache():
    model = tiny_model("llama")
    bundle = fitted(model, bits=6)
    passes = TwoPass(model, bundle.plan, 32, 32)
    with passes, torch.no_grad():
        prefilled = passes.prefill(WINDOWS[0])
        assert torch.allclose(passes.read(prefilled, {}), prefilled.logits, atol=1e-4)
        exact = passes.read(prefilled, {i: lambda x: x for i in range(len(bundle.plan.blocks))})
    torch.testing.assert_close(exact, prefilled.logits, atol=2e-4, rtol=1e-3)


def test_a_window_as_long_as_the_text_hides_every_error():
    model = tiny_model("llama")
    bundle = fitted(model, bits=1)
    codes = {i: (lambda x: torch.zeros_like(x)) for i in range(len(bundle.plan.blocks))}
    for window, hidden in ((160, True), (32, False)):
        passes = TwoPass(model, bundle.plan, 32, window)
        with passes, torch.no_grad():
            prefilled = passes.prefill(WINDOWS[0])
            divergence = float(kl_divergence(passes.read(prefilled, codes), prefilled.logits))
        assert (divergence < 1e-6) == hidden


def test_one_layer_alone_is_what_the_one_pass_simulator_computes():
    """With one coded layer nothing compounds, so the two protocols are the same."""
    model = tiny_model("llama")
    bundle = fitted(model, bits=2, layers=(2,), window=0)
    units = {str(i): coded.round_trip for i, coded in enumerate(bundle.blocks)}
    with Simulator(model, bundle.plan, units) as simulator, simulator.compressing(), torch.no_grad():
        expected = simulator.logits(WINDOWS[:1])
    passes = TwoPass(model, bundle.plan, 1, 0)
    with passes, torch.no_grad():
        found = passes.read(passes.prefill(WINDOWS[0]), {i: c.round_trip for i, c in enumerate(bundle.blocks)})
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def test_what_it_cannot_tune_is_refused():
    model = tiny_model("llama")
    with pytest.raises(InputError, match="linear"):
        distill(model, fitted(model, codec="autoencoder", latent_bits=8, bits=2, steps=0), WINDOWS)
    with pytest.raises(InputError, match="windows"):
        distill(model, fitted(model, bits=4), WINDOWS[:2])
    with pytest.raises(InputError, match="trains"):
        DistillOptions(trains="nothing")
    mixed = by_hand(model, [(Slot(1, 0, "key"), Slot(1, 0, "value"))], bits=5)
    assert isinstance(mixed.plan, Plan)
    distill(model, mixed, WINDOWS, DistillOptions(steps=1))
