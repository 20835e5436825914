"""``kvcar fit`` by profile: statistics, blocks, bits, codecs and tuning, from one text, to a size or to a divergence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..bundle import Bundle, ModelIdentity
from ..errors import FitError, InputError
from ..fit.fit import provenance
from ..fit.text import TextSource
from ..models.fingerprint import fingerprint
from ..models.geometry import read_geometry
from ..plan import Plan
from ..planner.budget import bits_for
from ..progress import OnProgress, silent
from ..shapes import KVGeometry
from ..train.distill import DistillOptions, distill
from ..train.losses import kl_divergence
from ..train.run import OnStep, told_nobody
from ..train.two_pass import TwoPass
from .build import Solved, choose_blocks, empty_plan, longest_run, predicted_curve, solve
from .options import PROFILES, ProfileOptions
from .statistics import Statistics, collect_statistics

CURVE_SIZES = (3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 12.0, 16.0, 20.0)
_HELD_WINDOWS = 2
_SEARCHES = 5


@dataclass(frozen=True)
class CurvePoint:
    """One size on the curve that a plan lies on.

    Attributes:
        times_smaller: in all, at 4,096 tokens.
        predicted_kl: by the quadratic model, scaled to what was measured at the chosen size; nats per token.
    """

    times_smaller: float
    predicted_kl: float


@dataclass(frozen=True)
class ProfileFit:
    """What ``fit_profile`` found.

    Attributes:
        bundle: the result.
        times_smaller: that it was made for.
        held_kl: two-pass divergence on held-back windows of the fitting text, before tuning.
        tuned_kl: the same after tuning; equal where there was none.
        curve: sizes around it, before tuning.
        history: entries of the tuning's steps.
    """

    bundle: Bundle
    times_smaller: float
    held_kl: float
    tuned_kl: float
    curve: tuple[CurvePoint, ...]
    history: tuple[dict[str, Any], ...] = ()


def fit_profile(
    model: PreTrainedModel,
    name: str,
    windows: Tensor,
    source: TextSource,
    options: ProfileOptions | None = None,
    on_progress: OnProgress = silent,
    on_step: OnStep = told_nobody,
) -> ProfileFit:
    """Fit a bundle whose blocks and bits are chosen by their measured effect on the model's output.

    Args:
        model: a causal language model with sdpa attention; it is only run, never changed.
        name: what to call it in the bundle.
        windows: token ids int64 ``[N, context]``; the last two are held back to choose and to compare on.
        source: where they come from, for provenance.
        options: see ``ProfileOptions``.
        on_progress, on_step: told what is going on.

    Raises:
        FitError: too little text, or a target out of reach.
        InputError: the model uses another attention implementation.
    """
    options = options or ProfileOptions()
    geometry = read_geometry(model.config)
    profile, model_bytes = PROFILES[options.profile], model.dtype.itemsize
    fitted, held = _split(windows, geometry, options)
    effect = _spread(fitted, options.effect_tokens)
    band = longest_run(geometry, profile)
    # Pages are read a page's step at a time where there is a window, and token by token where there is none.
    step = options.page_tokens if options.window else 1
    statistics = collect_statistics(
        model, geometry, fitted, effect, band, options.sinks, step, options.window, options.seed, on_progress
    )
    rough = empty_plan(geometry, [tuple(geometry.slots(kind)) for kind in ("key", "value")], options)
    budget = bits_for(rough, options.target, model_bytes)
    plan = empty_plan(geometry, choose_blocks(statistics, profile, budget, on_progress), options)
    measure = _Measure(model, plan, held)
    size, solved, held_kl = _to_target(statistics, plan, options, model_bytes, measure, on_progress)
    print_ = fingerprint(model)
    identity = ModelIdentity(
        name=name, architecture=type(model).__name__, dtype=print_.dtype, fingerprint=print_.digest
    )
    fit = provenance(fitted, source, options.seed, options.as_dict())
    bundle = Bundle(solved.plan, solved.blocks, print_, identity, fit)
    curve = _curve(statistics, plan, model_bytes, held_kl / max(solved.predicted_kl, 1e-12))
    if not options.tune_steps:
        return ProfileFit(bundle, size, held_kl, held_kl, curve)
    tuning = DistillOptions(
        steps=options.tune_steps, learning_rate=options.tune_rate, held_windows=len(held), seed=options.seed,
        validate_every=max(1, options.tune_steps // 2),
    )  # fmt: skip
    tuned = distill(model, bundle, torch.cat([fitted, held]), tuning, on_progress, on_step)
    return ProfileFit(tuned.bundle, size, tuned.before, tuned.after, curve, tuple(tuned.history))


class _Measure:
    """Two-pass divergence of solved plans on the same windows, their clean passes done once."""

    def __init__(self, model: PreTrainedModel, plan: Plan, windows: Tensor) -> None:
        self._passes = TwoPass(model, plan, plan.page_tokens if plan.window else 1, plan.window)
        with self._passes:
            self._prefilled = [self._passes.prefill(window) for window in windows]

    @torch.no_grad()
    def __call__(self, solved: Solved) -> float:
        codes = {i: coded.round_trip for i, coded in enumerate(solved.blocks)}
        with self._passes:
            parts = [float(kl_divergence(self._passes.read(p, codes), p.logits)) for p in self._prefilled]
        return sum(parts) / len(parts)


def _to_target(
    statistics: Statistics,
    plan: Plan,
    options: ProfileOptions,
    model_bytes: int,
    measure: _Measure,
    on_progress: OnProgress,
) -> tuple[float, Solved, float]:
    """Size, solution and its measured divergence: at the size asked for, or the smallest within ``max_kl``."""
    if options.max_kl is None:
        solved = solve(statistics, plan, options.target, model_bytes, on_progress)
        return options.target, solved, measure(solved)
    best: tuple[float, Solved, float] | None = None
    low, high = 1.5, _largest_size(statistics, plan, model_bytes)
    size = min(options.target, (low * high) ** 0.5)
    for search in range(_SEARCHES):
        solved = solve(statistics, plan, size, model_bytes, silent)
        found = measure(solved)
        if found <= options.max_kl:
            low, best = size, (size, solved, found)
        else:
            high = size
        on_progress("search for the smallest size", search + 1, _SEARCHES)
        size = (low * high) ** 0.5
    if best is None:
        raise FitError(
            f"a KL divergence of {options.max_kl:g} is out of reach: {size:.2f} times smaller still costs {found:.4f}; "
            "ask for more, or give more text to fit on"
        )
    return best


def _largest_size(statistics: Statistics, plan: Plan, model_bytes: int) -> float:
    """The largest of the curve's sizes that is within reach."""
    return predicted_curve(statistics, plan, CURVE_SIZES, model_bytes)[-1][0]


def _curve(statistics: Statistics, plan: Plan, model_bytes: int, factor: float) -> tuple[CurvePoint, ...]:
    points = predicted_curve(statistics, plan, CURVE_SIZES, model_bytes)
    return tuple(CurvePoint(size, factor * kl) for size, kl in points)


def _split(windows: Tensor, geometry: KVGeometry, options: ProfileOptions) -> tuple[Tensor, Tensor]:
    """Windows to fit on and windows held back."""
    if windows.ndim != 2 or len(windows) <= _HELD_WINDOWS:
        raise InputError(
            f"a fit by profile needs more than {_HELD_WINDOWS} windows of token ids, got shape {tuple(windows.shape)}; "
            "give it more text"
        )
    if windows.shape[1] > geometry.max_positions:
        raise InputError(
            f"windows of {windows.shape[1]} tokens are longer than the model's {geometry.max_positions} positions"
        )
    if windows.shape[1] <= options.sinks + 2 * options.window:
        raise InputError(
            f"windows of {windows.shape[1]} tokens are too short for {options.sinks} sinks and a window of "
            f"{options.window}; fit on longer ones"
        )
    fitted = windows[:-_HELD_WINDOWS]
    usable, width = fitted.shape[0] * (fitted.shape[1] - options.sinks), geometry.kv_heads * geometry.head_dim
    widest = min(PROFILES[options.profile].widest_elements, longest_run(geometry, PROFILES[options.profile]) * width)
    if usable < 2 * widest:
        raise FitError(
            f"{usable} tokens are too few to fit blocks of up to {widest} elements (needed: at least {2 * widest}); give "
            "more text or tokens, or a profile with narrower blocks"
        )
    return fitted, windows[-_HELD_WINDOWS:]


def _spread(windows: Tensor, tokens: int) -> Tensor:
    """About ``tokens`` tokens' worth of windows, evenly spread."""
    count = min(len(windows), max(1, round(tokens / windows.shape[1])))
    places = torch.linspace(0, len(windows) - 1, count).round().long()
    return windows[places]
