"""``kvcar fit`` by profile: statistics, blocks, bits, codecs and tuning, from one text, to a size or to a divergence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..bundle import Bundle, identify
from ..errors import FitError, InputError
from .fit import provenance
from ..text import TextSource
from ..models.geometry import read_geometry
from ..plan import CacheConfig, Plan
from .budget import bits_for
from ..progress import OnProgress, silent
from ..geometry import KINDS, KVGeometry
from .losses import kl_divergence
from .two_pass import TwoPass
from .search import Solved, bands, block_options, empty_plan, longest_run, predicted_curve, solve
from .profiles import PROFILES, ProfileOptions
from .statistics import Statistics, collect_statistics
from .stored import solve_stored

CURVE_SIZES = (3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 12.0, 16.0, 20.0)
_HELD_WINDOWS = 2
_SEARCHES = 6
_SMALLEST_SIZE, _LARGEST_SIZE = 1.2, 40.0


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
        held_kl: two-pass divergence on held-back windows of the fitting text.
        curve: sizes around it.
    """

    bundle: Bundle
    times_smaller: float
    held_kl: float
    curve: tuple[CurvePoint, ...]


def fit_profile(
    model: PreTrainedModel,
    name: str,
    windows: Tensor,
    source: TextSource,
    options: ProfileOptions | None = None,
    on_progress: OnProgress = silent,
) -> ProfileFit:
    """Fit a bundle whose blocks and bits are chosen by their measured effect on the model's output.

    Args:
        model: a causal language model with sdpa attention; it is only run, never changed.
        name: what to call it in the bundle.
        windows: token ids int64 ``[N, context]``; the last two are held back to choose and to compare on.
        source: where they come from, for provenance.
        options: see ``ProfileOptions``.
        on_progress: told what is going on.

    Raises:
        FitError: too little text, or a target out of reach.
        InputError: the model uses another attention implementation.
    """
    return next(fit_profiles(model, name, windows, source, [options or ProfileOptions()], on_progress))


def fit_profiles(
    model: PreTrainedModel,
    name: str,
    windows: Tensor,
    source: TextSource,
    options: Sequence[ProfileOptions],
    on_progress: OnProgress = silent,
) -> Iterator[ProfileFit]:
    """Fit several, one after the other, from the same statistics, as ``fit_profile`` does one.

    Raises:
        InputError: they differ in what the statistics depend on (window, sinks, pages, effect tokens, seed).
    """
    first, geometry = options[0], read_geometry(model.config)
    if len({(o.window, o.window_read, o.sinks, o.page_tokens, o.effect_tokens, o.seed) for o in options}) > 1:
        raise InputError(
            "profiles fitted together must share window, sinks, page_tokens, effect_tokens and seed, and all be for stored "
            "contexts or none"
        )
    for each in options:
        _check_text(windows, geometry, each)
    fitted, held = windows[:-_HELD_WINDOWS], windows[-_HELD_WINDOWS:]
    apart, shared = zip(*(bands(geometry, PROFILES[each.profile]) for each in options), strict=True)
    statistics = collect_statistics(
        model, geometry, fitted, _spread(fitted, first.effect_tokens), (max(apart), max(shared)), first.sinks,
        CacheConfig(first.window, first.sinks, first.page_tokens).step_tokens, first.window_read, first.seed, on_progress,
    )  # fmt: skip
    plans: dict[tuple[str, float], list[Plan]] = {}
    for each in options:
        given = (each.profile, each.target)
        if given not in plans:
            plans[given] = _plans(statistics, each, model.dtype.itemsize, on_progress)
        yield _fit_one(model, name, (fitted, held), source, each, statistics, plans[given], on_progress)


def _plans(statistics: Statistics, options: ProfileOptions, model_bytes: int, on_progress: OnProgress) -> list[Plan]:
    geometry, profile = statistics.geometry, PROFILES[options.profile]
    rough = empty_plan(geometry, [tuple(geometry.slots(kind)) for kind in KINDS], options)
    # Blocks without a limit on FLOPs do not depend on the budget, and entropy-coded sizes reach further than whole bits.
    budget = 1 if profile.flops_per_element is None else bits_for(rough, options.target, model_bytes)
    return [empty_plan(geometry, b, options) for b in block_options(statistics, profile, budget, on_progress)]


def _fit_one(
    model: PreTrainedModel,
    name: str,
    windows: tuple[Tensor, Tensor],
    source: TextSource,
    options: ProfileOptions,
    statistics: Statistics,
    plans: Sequence[Plan],
    on_progress: OnProgress,
) -> ProfileFit:
    fitted, held = windows
    best = _best_plan(model, held, options, statistics, plans, on_progress)
    print_, identity = identify(model, name)
    fit = provenance(fitted, source, options.seed, options.as_dict() | {"times_smaller": best.size})
    bundle = Bundle(best.solved.plan, best.solved.blocks, print_, identity, fit)
    curve = best.solver.curve(best.held_kl / max(best.solved.predicted_kl, 1e-12))
    return ProfileFit(bundle, best.size, best.held_kl, curve)


@dataclass(frozen=True)
class _Found:
    """A plan at the size asked for, or at the smallest within the divergence asked for."""

    solver: _Solver
    size: float
    solved: Solved
    held_kl: float


def _best_plan(
    model: PreTrainedModel,
    held: Tensor,
    options: ProfileOptions,
    statistics: Statistics,
    plans: Sequence[Plan],
    on_progress: OnProgress,
) -> _Found:
    """The smallest of the plans, or of equal size the one whose measured divergence is least.

    The quadratic model does not decide here: what it expects of wide blocks at few bits may be too good by half.
    """
    found: list[_Found] = []
    for index, plan in enumerate(plans):
        solver = _Solver(statistics, plan, options, model.dtype.itemsize)
        measure = _Measure(model, plan, held, options.window_read)
        try:
            found.append(_Found(solver, *_to_target(solver, options, measure, on_progress)))
        except FitError:
            if index == len(plans) - 1 and not found:
                raise
    return min(found, key=lambda each: (-each.size, each.held_kl))


class _Solver:
    """Solutions of one plan at any size."""

    def __init__(self, statistics: Statistics, plan: Plan, options: ProfileOptions, model_bytes: int) -> None:
        self._statistics, self._plan, self._model_bytes = statistics, plan, model_bytes
        self._profile = PROFILES[options.profile]

    def __call__(self, size: float, on_progress: OnProgress) -> Solved:
        if self._profile.entropy_coded:
            return solve_stored(self._statistics, self._plan, size, on_progress)
        return solve(self._statistics, self._plan, self._profile, size, self._model_bytes, on_progress)

    def curve(self, factor: float) -> tuple[CurvePoint, ...]:
        """Sizes within reach, predicted divergences times ``factor``; none for entropy-coded ones, each of which would take a search."""
        if self._profile.entropy_coded:
            return ()
        points = predicted_curve(self._statistics, self._plan, self._profile, CURVE_SIZES, self._model_bytes)
        return tuple(CurvePoint(size, factor * kl) for size, kl in points)


class _Measure:
    """Two-pass divergence of solved plans on the same windows, their clean passes done once."""

    def __init__(self, model: PreTrainedModel, plan: Plan, windows: Tensor, window_read: int) -> None:
        self._passes = TwoPass(model, plan, plan.cache.step_tokens, window_read)
        with self._passes:
            self._prefilled = [self._passes.prefill(window) for window in windows]

    @torch.no_grad()
    def __call__(self, solved: Solved) -> float:
        codes = {i: coded.round_trip for i, coded in enumerate(solved.blocks)}
        with self._passes:
            parts = [float(kl_divergence(self._passes.read(p, codes), p.logits)) for p in self._prefilled]
        return sum(parts) / len(parts)


def _to_target(
    solver: _Solver, options: ProfileOptions, measure: _Measure, on_progress: OnProgress
) -> tuple[float, Solved, float]:
    """Size, solution and its measured divergence: at the size asked for, or the smallest within ``max_kl``."""
    if options.max_kl is None:
        solved = solver(options.target, on_progress)
        return options.target, solved, measure(solved)
    best: tuple[float, Solved, float] | None = None
    curve = solver.curve(1.0)
    low, high = _SMALLEST_SIZE, curve[-1].times_smaller if curve else _LARGEST_SIZE
    size = min(options.target, (low * high) ** 0.5)
    for search in range(_SEARCHES):
        solved = solver(size, silent)
        found = measure(solved)
        if found <= options.max_kl:
            low, best = size, (size, solved, found)
        else:
            high = size
        on_progress("search for the smallest size", search + 1, _SEARCHES)
        size = (low * high) ** 0.5
    if best is None:
        raise FitError(
            f"a KL divergence of {options.max_kl:g} is out of reach: {high:.2f} times smaller still costs more; "
            "ask for more, or give more text to fit on"
        )
    return best


def _check_text(windows: Tensor, geometry: KVGeometry, options: ProfileOptions) -> None:
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
    width = geometry.kv_heads * geometry.head_dim
    usable = (len(windows) - _HELD_WINDOWS) * (windows.shape[1] - options.sinks)
    widest = min(PROFILES[options.profile].widest_elements, longest_run(geometry, PROFILES[options.profile]) * width)
    if usable < 2 * widest:
        raise FitError(
            f"{usable} tokens are too few to fit blocks of up to {widest} elements (needed: at least {2 * widest}); give "
            "more text or tokens, or a profile with narrower blocks"
        )


def _spread(windows: Tensor, tokens: int) -> Tensor:
    """About ``tokens`` tokens' worth of windows, evenly spread."""
    count = min(len(windows), max(1, round(tokens / windows.shape[1])))
    places = torch.linspace(0, len(windows) - 1, count).round().long()
    return windows[places]
