"""Latents go where they matter."""

import pytest
import torch
from bundles import SOURCE, fit_options
from tiny import tiny_model, token_ids

from kvcar.errors import InputError
from kvcar.fit.fit import fit_bundles
from kvcar.fit.losses import kl_divergence
from kvcar.paper.effect import latents_by_effect, share_latents
from kvcar.paper.simulate import Simulator, units_of

WINDOWS = token_ids(128, batch=16, seed=21)


def fitted(model, allocate=None, **more):
    options = fit_options(**({"key_latents": 20, "value_latents": 24, "latent_bits": 16, "window": 0} | more))
    return next(fit_bundles(model, WINDOWS, [options], SOURCE, "tiny", allocate=allocate))


def divergence(model, bundle):
    ids = token_ids(96, batch=6, seed=5)
    with torch.no_grad(), Simulator(model, bundle.plan, units_of(bundle, ids.device)) as simulator:
        with simulator.compressing(()):
            full = simulator.logits(ids)
        with simulator.compressing():
            return float(kl_divergence(simulator.logits(ids), full))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_same_latents_shared_by_effect_do_less_harm(family):
    model = tiny_model(family)
    if family == "gpt2":
        options = {"key_latents": 40, "value_latents": 48}
    else:
        options = {}
    even = fitted(model, **options)
    found = fitted(model, lambda *given: latents_by_effect(model, WINDOWS[:4], *given), **options)
    latents = [[block.latents for block in bundle.plan.blocks] for bundle in (even, found)]
    assert sum(latents[0]) == sum(latents[1])
    assert latents[0] != latents[1]
    assert divergence(model, found) < 0.95 * divergence(model, even)


def test_sharing():
    gains = [torch.tensor([9.0, 3.0, 1.0]), torch.tensor([0.5, 0.1, 0.0]), torch.tensor([8.0, 7.0, 6.0])]
    assert share_latents(gains, 5) == (1, 1, 3)
    assert share_latents(gains, 3) == (1, 1, 1)
    assert share_latents(gains, 6) == (2, 1, 3)
    assert share_latents(gains, 9) == (3, 3, 3)


def test_a_budget_of_bits_has_no_latents_to_share():
    model = tiny_model("llama")
    with pytest.raises(InputError, match="key_latents and value_latents"):
        next(fit_bundles(model, WINDOWS, [fit_options(bits=4, window=0)], allocate=lambda *given: (1,)))
