"""The effect metric against what it stands for: the divergence that small errors really cause."""

import pytest
import torch
from tiny import FAMILIES, tiny_model, token_ids

from kvcar.fit.effect import EffectProbe, damped, effect_metrics
from kvcar.fit.losses import kl_divergence
from kvcar.fit.two_pass import TwoPass
from kvcar.geometry import Slot
from kvcar.models.geometry import read_geometry
from kvcar.plan import Block, CacheConfig, Plan

WINDOWS = token_ids(96, batch=24, seed=1)


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("kind", ["key", "value"])
def test_the_metric_predicts_the_divergence_of_small_errors(family, kind):
    model = tiny_model(family)
    geometry = read_geometry(model.config)
    layer = geometry.codable_layers[0]
    metrics = effect_metrics(EffectProbe(model, geometry, 4, 32, 32), WINDOWS)
    slots = tuple(Slot(layer, head, kind) for head in range(geometry.kv_heads))
    plan = Plan(
        geometry=geometry, blocks=(Block(codec="linear", slots=slots),), cache=CacheConfig(page_tokens=32, window=32)
    )
    width, draw = len(slots) * geometry.head_dim, torch.Generator().manual_seed(0)
    spread = 0.05 * (1 + torch.arange(width) % 3)
    passes, found = TwoPass(model, plan, 32, 32), []
    with passes, torch.no_grad():
        for window in WINDOWS:
            prefilled = passes.prefill(window)
            noise = torch.randn(len(window), width, generator=draw) * spread
            found.append(float(kl_divergence(passes.read(prefilled, {0: lambda x, e=noise: x + e}), prefilled.logits)))
    predicted = 0.5 * float((metrics[layer, kind].diagonal() * spread.double() ** 2).sum())
    # Sinks are not coded, and 24 short windows leave noise in both figures.
    assert 0.5 < (sum(found) / len(found)) / (predicted * 92 / 96) < 2


def test_exact_tokens_cost_nothing():
    model = tiny_model("llama")
    geometry = read_geometry(model.config)
    metrics = effect_metrics(EffectProbe(model, geometry, 4, 96, 0), WINDOWS[:2])
    assert all(float(m.abs().sum()) == 0 for m in metrics.values())


def test_the_model_is_left_as_it_was():
    model = tiny_model("llama")
    model.lm_head.weight.requires_grad_(False)
    before = model(input_ids=WINDOWS[:1]).logits
    effect_metrics(EffectProbe(model, read_geometry(model.config), 4, 32, 32), WINDOWS[:1])
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    assert not flags["lm_head.weight"]
    assert sum(not f for f in flags.values()) <= 2  # tied embeddings share the flag
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(model(input_ids=WINDOWS[:1]).logits, before)


def test_damping_is_definite_and_costs_its_share():
    covariance = torch.diag(torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64))
    metric = torch.diag(torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64))
    result = damped(metric, covariance)
    assert torch.linalg.eigvalsh(result).min() > 0
    extra = (result - metric).diagonal() * covariance.diagonal()
    torch.testing.assert_close(extra, extra[:1].expand(3))
