"""The plan at a size, or the smallest within a divergence: partitions solved, and compared by what they cost on held-out text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import FitError
from ..geometry import BFLOAT16_BYTES, KVGeometry
from ..plan import Block, Plan
from ..progress import OnProgress, silent
from .bits import bits_for, error_of
from .codecs import Solved, bits_of, budget_for, solve
from .losses import kl_divergence
from .options import FitOptions
from .partition import given_partition, searched_partitions, widest_blocks
from .statistics import Slots, Statistics
from .two_pass import TwoPass

CURVE_SIZES = (3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 12.0, 16.0, 20.0)
_SEARCHES = 6
_SMALLEST_SIZE, _LARGEST_SIZE = 1.2, 40.0

# Root mean square of an element beyond which what is exact keeps the model's own dtype.
LARGEST_IN_FLOAT16 = 32.0


@dataclass(frozen=True)
class Found:
    """A plan with its codecs, and what is known about it.

    Attributes:
        solved: plan and codecs.
        size: times smaller that they were made for.
        two_pass_kl: divergence on held-out windows read in two passes, nats per token; None for a given structure.
        curve: (times smaller, expected divergence) of sizes around it, scaled to what was measured at this one.
    """

    solved: Solved
    size: float
    two_pass_kl: float | None = None
    curve: tuple[tuple[float, float], ...] = ()


def empty_plan(geometry: KVGeometry, blocks: Sequence[Slots], options: FitOptions) -> Plan:
    """The plan whose blocks have no bits yet."""
    return Plan.checked(
        geometry=geometry,
        blocks=tuple(
            Block(codec=options.codec, slots=slots, page_means=options.page_means, trellis=options.trellis)
            for slots in blocks
        ),
        reuses=() if options.structure is None else options.structure.reuses,
        cache=options.cache,
    )


def fits_float16(plan: Plan, statistics: Statistics) -> bool:
    """Whether sinks and window of a float32 model lose nothing that matters in float16, at half the bytes.

    Its error is at most 2 ** -11 of an element: noise, unless keys are large because of what they all share, as with
    Qwen2's biases, where attention sees only how they differ.
    """
    slots = [block.slots for block in plan.blocks]
    power = (statistics.mean(each).square() + statistics.variance(each) for each in slots)
    return all(float(each.max()) <= LARGEST_IN_FLOAT16**2 for each in power)


def given_plan(statistics: Statistics, options: FitOptions, model_bytes: int, on_progress: OnProgress) -> Found:
    """The plan of a given structure.

    Raises:
        FitError: a size out of reach.
    """
    assert options.structure is not None
    geometry = statistics.geometry
    plan = empty_plan(geometry, given_partition(geometry, options.structure), options)
    if not plan.blocks:
        return Found(Solved(plan, (), 0.0), options.target)
    budget = budget_for(plan, options, options.target, model_bytes)
    return Found(solve(plan, statistics, budget, options, on_progress), options.target)


def searched_plans(
    statistics: Statistics, options: FitOptions, model_bytes: int, on_progress: OnProgress
) -> list[Plan]:
    """The best partition of each sort that a profile tries, as plans without bits."""
    geometry, limits = statistics.geometry, options.limits
    assert limits is not None
    rough = empty_plan(geometry, widest_blocks(geometry), options)
    # Blocks without a limit on FLOPs do not depend on the budget, and entropy-coded sizes reach further than whole bits.
    budget = 1 if limits.flops_per_element is None else bits_for(rough, options.target, model_bytes)
    partitions = searched_partitions(statistics, limits, budget, options.tokens_in_memory, on_progress)
    return [empty_plan(geometry, blocks, options) for blocks in partitions]


def best_plan(
    model: PreTrainedModel,
    held_out: Tensor,
    plans: Sequence[Plan],
    statistics: Statistics,
    options: FitOptions,
    on_progress: OnProgress,
) -> Found:
    """The smallest of the plans, or of equal size the one whose measured divergence is least.

    The quadratic model does not decide here: what it expects of wide blocks at few bits may be too good by half.

    Args:
        model: whose cache is coded, with sdpa attention.
        held_out: token ids int64 ``[N, T]`` to measure on.
        plans: see ``searched_plans``.
        statistics, options, on_progress: see ``fit_bundles``.

    Raises:
        FitError: a target that no plan reaches.
    """
    found: list[tuple[_Sizes, Found]] = []
    for index, plan in enumerate(plans):
        sizes = _Sizes(plan, statistics, options, BFLOAT16_BYTES)
        measure = _Measure(model, plan, held_out, options.window_read)
        try:
            found.append((sizes, _to_target(sizes, options, measure, on_progress)))
        except FitError:
            if index == len(plans) - 1 and not found:
                raise
    sizes, best = min(found, key=lambda each: (-each[1].size, each[1].two_pass_kl))
    assert best.two_pass_kl is not None
    factor = best.two_pass_kl / max(best.solved.expected_kl, 1e-12)
    return Found(best.solved, best.size, best.two_pass_kl, tuple((s, factor * kl) for s, kl in sizes.curve()))


class _Sizes:
    """Solutions of one plan at any size."""

    def __init__(self, plan: Plan, statistics: Statistics, options: FitOptions, model_bytes: int) -> None:
        self._plan, self._statistics, self._options, self._model_bytes = plan, statistics, options, model_bytes
        self._curve: tuple[tuple[float, float], ...] | None = None

    def __call__(self, size: float, on_progress: OnProgress) -> Solved:
        budget = budget_for(self._plan, self._options, size, self._model_bytes)
        return solve(self._plan, self._statistics, budget, self._options, on_progress)

    def curve(self) -> tuple[tuple[float, float], ...]:
        """(times smaller, expected divergence) at sizes within reach; none for entropy-coded ones, each of which takes a search."""
        if self._curve is None:
            self._curve = () if self._options.entropy_coded else tuple(self._points())
        return self._curve

    def _points(self) -> list[tuple[float, float]]:
        blocks, metric = self._plan.blocks, self._options.metric
        variances = [self._statistics.basis(block.slots, metric).variances for block in blocks]
        points = []
        for size in CURVE_SIZES:
            try:
                budget = budget_for(self._plan, self._options, size, self._model_bytes)
            except FitError:
                break  # larger sizes are out of reach too
            bits = bits_of(self._plan, variances, budget, self._options)
            points.append((size, sum(error_of(v, b) for v, b in zip(variances, bits, strict=True))))
        return points


class _Measure:
    """Two-pass divergence of solved plans on the same windows, their clean passes done once."""

    def __init__(self, model: PreTrainedModel, plan: Plan, windows: Tensor, window_read: int) -> None:
        self._passes = TwoPass(model, plan, plan.cache.step_tokens, window_read)
        with self._passes:
            self._prefilled = [self._passes.prefill(window) for window in windows]

    @torch.no_grad()
    def __call__(self, solved: Solved) -> float:
        plan, device = solved.plan, self._passes.parts.device
        tokens = [plan.page_tokens if block.page_means else None for block in plan.blocks]
        there = [own.on(device, block, plan) for own, block in zip(solved.blocks, plan.blocks, strict=True)]
        codes = {
            i: partial(coded.round_trip, mean_tokens=n) for i, (coded, n) in enumerate(zip(there, tokens, strict=True))
        }
        with self._passes:
            parts = [float(kl_divergence(self._passes.read(p, codes), p.logits)) for p in self._prefilled]
        return sum(parts) / len(parts)


def _to_target(sizes: _Sizes, options: FitOptions, measure: _Measure, on_progress: OnProgress) -> Found:
    """The solution at the size asked for, or the smallest within ``max_kl``."""
    if options.max_kl is None:
        solved = sizes(options.target, on_progress)
        return Found(solved, options.target, measure(solved))
    best: Found | None = None
    curve = sizes.curve()
    low, high = _SMALLEST_SIZE, curve[-1][0] if curve else _LARGEST_SIZE
    size = min(options.target, (low * high) ** 0.5)
    for search in range(_SEARCHES):
        solved = sizes(size, silent)
        kl = measure(solved)
        if kl <= options.max_kl:
            low, best = size, Found(solved, size, kl)
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
