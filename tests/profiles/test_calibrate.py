"""What errors cost against what the metric expects: 1 where they ignore the gradients, more where they follow them."""

import torch
from tiny import tiny_model, token_ids

from kvcar.fit.effect import EffectProbe
from kvcar.models.geometry import read_geometry
from kvcar.plan import Block, Plan
from kvcar.profiles.calibrate import cost_ratios
from kvcar.progress import silent
from kvcar.shapes import KINDS

SINKS, STEP, WINDOW, SEED = 4, 32, 32, 5


def setting():
    model = tiny_model("llama")
    geometry = read_geometry(model.config)
    blocks = tuple(Block(codec="linear", slots=tuple(geometry.slots(kind))) for kind in KINDS)
    plan = Plan(geometry=geometry, blocks=blocks, sinks=SINKS, window=WINDOW, page_tokens=STEP, exact_dtype="bfloat16")
    return model, plan, token_ids(256, batch=6, seed=7)


def noisy(scale):
    """Codes that add noise, of a size for every token."""

    def code(x):
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(int(x.abs().sum() * 1000) % 2**31))
        return x + scale(x) * noise

    return code


def test_errors_that_ignore_the_gradients_cost_what_the_metric_expects():
    model, plan, windows = setting()
    codes = {index: noisy(lambda x: 0.1) for index in range(2)}
    ratios = cost_ratios(model, plan, codes, windows, WINDOW, SEED, silent)
    assert set(ratios) == {(layer, kind) for layer in range(plan.geometry.layers) for kind in KINDS}
    assert all(0.5 < ratio < 2 for ratio in ratios.values()), ratios


def test_errors_where_the_gradients_are_large_cost_more():
    model, plan, windows = setting()
    sizes = {}

    def hear(layer, kind, gradients):
        sizes[layer, kind] = gradients.norm(dim=1, keepdim=True)

    probe = EffectProbe(model, plan.geometry, SINKS, STEP, WINDOW, SEED)
    weights = []
    for window in windows:
        for _ in probe.run(window[None], hear):
            weights.append(sizes[1, "key"] / sizes[1, "key"].square().mean().sqrt())
    calls = iter(weights)
    ratios = cost_ratios(model, plan, {0: noisy(lambda x: 0.1 * next(calls))}, windows, WINDOW, SEED, silent)
    assert ratios[1, "key"] > 1.5
    assert not any(kind == "value" for _, kind in ratios), "values have no codes here"


def test_codes_without_errors_change_nothing():
    model, plan, windows = setting()
    ratios = cost_ratios(model, plan, {0: lambda x: x}, windows[:1], WINDOW, SEED, silent)
    assert set(ratios.values()) == {1.0}
