"""Which adjacent layers share a block, by measured gain under two budgets: bits and decoder FLOPs per token.

For a price of a bit, a block's cost is what its error does to the output plus what its bits cost, each latent at the whole
number of bits that suits it (reverse water-filling: Cover and Thomas, 10.3.3). A wider block never costs more that way, but
decoding it does; a second price, on FLOPs, decides how wide it pays to go. Layers are cut into runs by dynamic programming.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .bits import DISTORTION

Run = tuple[int, int]
"""(first place, number of layers) among the layers that may be coded."""


@dataclass(frozen=True)
class RunCost:
    """One candidate at a price of a bit.

    Attributes:
        cost: error plus price times bits, in the unit of the error.
        flops: of decoding one token of the block.
    """

    cost: float
    flops: float


def bits_at_price(variances: Tensor, price: float) -> Tensor:
    """Bits 0 to 8, int64 ``[R]``, of latents whose error costs half their variance times the quantiser's distortion."""
    steps = torch.tensor(DISTORTION, dtype=torch.float64)
    costs = 0.5 * variances.double()[:, None] * steps + price * torch.arange(len(steps))
    return costs.argmin(1)


def error_of(variances: Tensor, bits: Tensor) -> float:
    """What the errors cost: half the sum of variance times distortion, nats under an effect metric."""
    return 0.5 * float((variances.double() * torch.tensor(DISTORTION, dtype=torch.float64)[bits]).sum())


def price_for(variances: Sequence[Tensor], budget_bits: float) -> float:
    """Price of a bit at which latents of all blocks together take about ``budget_bits``."""
    flat = torch.cat([v.double() for v in variances])
    steps = torch.tensor(DISTORTION, dtype=torch.float64)
    gains = (0.5 * flat[:, None] * (steps[:-1] - steps[1:])).flatten()
    kept = min(max(int(budget_bits), 1), len(gains))
    return float(gains.topk(kept).values[-1])


def run_cost(variances: Tensor, price: float) -> RunCost:
    """Cost and FLOPs of a block with these variances."""
    bits = bits_at_price(variances, price)
    latents = int((bits > 0).sum())
    return RunCost(error_of(variances, bits) + price * int(bits.sum()), 2.0 * latents * len(variances))


def cut_into_runs(layers: int, candidates: Mapping[Run, RunCost], flops_price: float) -> list[Run]:
    """The runs that cover ``layers`` places in order at the least cost plus ``flops_price`` times FLOPs."""
    best: list[tuple[float, Run | None]] = [(0.0, None), *((float("inf"), None) for _ in range(layers))]
    for end in range(1, layers + 1):
        for (first, count), own in candidates.items():
            if first + count == end:
                total = best[first][0] + own.cost + flops_price * own.flops
                if total < best[end][0]:
                    best[end] = (total, (first, count))
    runs: list[Run] = []
    place = layers
    while place:
        run = best[place][1]
        if run is None:
            raise ValueError("the candidates do not cover all layers")
        runs.append(run)
        place = run[0]
    return runs[::-1]


def partition(
    layers: int, sides: Sequence[Mapping[Run, Tensor]], budget_bits: float, flops_budget: float | None
) -> list[list[Run]]:
    """Runs of layers for every side (keys, values), the same prices for all.

    Args:
        layers: how many may be coded.
        sides: variances of every candidate run, float ``[W]``, one mapping for keys and one for values.
        budget_bits: bits per token of all blocks together.
        flops_budget: FLOPs of decoding one token of all blocks; None for no limit.
    """
    cuts = [_widest(layers, side) for side in sides]
    for _ in range(2):
        # Which cut is best depends on the price of a bit, and that, a little, on the cut.
        price = price_for([side[run] for side, cut in zip(sides, cuts, strict=True) for run in cut], budget_bits)
        costs = [{run: run_cost(variances, price) for run, variances in side.items()} for side in sides]
        cuts = _within_flops(lambda p, costs=costs: [cut_into_runs(layers, c, p) for c in costs], costs, flops_budget)
    return cuts


def _within_flops(
    cut: Callable[[float], list[list[Run]]], costs: Sequence[Mapping[Run, RunCost]], budget: float | None
) -> list[list[Run]]:
    """The cut at the lowest price of a FLOP that keeps to the budget; the narrowest one if none does."""

    def flops(cuts: list[list[Run]]) -> float:
        return sum(side[run].flops for side, own in zip(costs, cuts, strict=True) for run in own)

    free = cut(0.0)
    if budget is None or flops(free) <= budget:
        return free
    low, high = 1e-18, 1.0
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if flops(cut(middle)) <= budget else (middle, high)
    return cut(high)


def _widest(layers: int, side: Mapping[Run, Tensor]) -> list[Run]:
    """Any cover to begin with: from each place the longest run."""
    runs, place = [], 0
    while place < layers:
        run = max((r for r in side if r[0] == place), key=lambda r: r[1])
        runs.append(run)
        place += run[1]
    return runs
