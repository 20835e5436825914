"""Which adjacent layers share a block, by measured gain under two budgets: bits and decoder FLOPs per token.

For a price of a bit, a block's cost is what its error does to the output plus what its bits cost, each latent at the whole
number of bits that suits it (reverse water-filling: Cover and Thomas, 10.3.3). A wider block never costs more that way, but
decoding it does; a second price, on FLOPs, decides how wide it pays to go. Layers are cut into runs by dynamic programming.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from .bits import DISTORTION


@dataclass(frozen=True)
class Run:
    """Adjacent layers among those that may be coded: one block, or, of a single layer, ``parts`` blocks of as many heads."""

    first: int
    count: int
    parts: int = 1


class Candidate(NamedTuple):
    """What a run offers: variances of its latents, float ``[W]``, and what each of them costs, in FLOPs per token."""

    variances: Tensor
    flops_per_latent: float


_PRICE_SEARCHES = 50
T = TypeVar("T")


@dataclass(frozen=True)
class RunCost:
    """One candidate at a price of a bit.

    Attributes:
        cost: error plus price times bits, in the unit of the error.
        flops: of one token.
    """

    cost: float
    flops: float


def bits_at_price(variances: Tensor, price: float, latent_cost: Tensor | float = 0.0) -> Tensor:
    """Bits 0 to 8, int64 ``[R]``, of latents whose error costs half their variance times the quantiser's distortion.

    ``latent_cost`` is what a latent costs that has any bits at all.
    """
    steps = torch.tensor(DISTORTION, dtype=torch.float64)
    costs = 0.5 * variances.double()[:, None] * steps + price * torch.arange(len(steps))
    costs[:, 1:] += latent_cost[:, None] if isinstance(latent_cost, Tensor) else latent_cost
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


def run_cost(candidate: Candidate, price: float, flops_price: float = 0.0) -> RunCost:
    """Cost and FLOPs of a candidate at a price of a bit and one of a FLOP, which the cost leaves out."""
    bits = bits_at_price(candidate.variances, price, flops_price * candidate.flops_per_latent)
    latents = int((bits > 0).sum())
    return RunCost(error_of(candidate.variances, bits) + price * int(bits.sum()), candidate.flops_per_latent * latents)


def cut_into_runs(layers: int, candidates: Mapping[Run, RunCost], flops_price: float) -> list[Run]:
    """The runs that cover ``layers`` places in order at the least cost plus ``flops_price`` times FLOPs."""
    best: list[tuple[float, Run | None]] = [(0.0, None), *((float("inf"), None) for _ in range(layers))]
    for end in range(1, layers + 1):
        for run, own in candidates.items():
            if run.first + run.count == end:
                total = best[run.first][0] + own.cost + flops_price * own.flops
                if total < best[end][0]:
                    best[end] = (total, run)
    runs: list[Run] = []
    place = layers
    while place:
        run = best[place][1]
        if run is None:
            raise ValueError("the candidates do not cover all layers")
        runs.append(run)
        place = run.first
    return runs[::-1]


def partition(
    layers: int,
    sides: Sequence[Mapping[Run, Candidate]],
    budget_bits: float,
    flops_budget: float | None,
    price_latents: bool = False,
) -> list[list[Run]]:
    """Runs of layers for every side (keys, values), the same prices for all.

    Args:
        layers: how many may be coded.
        sides: every candidate run, one mapping for keys and one for values.
        budget_bits: bits per token of all blocks together.
        flops_budget: FLOPs of one token of all blocks; None for no limit.
        price_latents: whether bits will be shared by ``allocate_bits_and_flops``, which gives up latents to save FLOPs.
    """
    cuts = [_widest(layers, side) for side in sides]
    for _ in range(2):
        # Which cut is best depends on the price of a bit, and that, a little, on the cut.
        chosen = [side[run].variances for side, cut in zip(sides, cuts, strict=True) for run in cut]
        price = price_for(chosen, budget_bits)
        cuts = _within_flops(layers, sides, price, flops_budget, price_latents)
    return cuts


def _within_flops(
    layers: int,
    sides: Sequence[Mapping[Run, Candidate]],
    price: float,
    budget: float | None,
    price_latents: bool,
) -> list[list[Run]]:
    """The cuts at the lowest price of a FLOP that keeps to the budget; the narrowest ones if none does."""

    def costs_at(flops_price: float) -> list[dict[Run, RunCost]]:
        return [{run: run_cost(own, price, flops_price) for run, own in side.items()} for side in sides]

    unpriced = costs_at(0.0)

    def cut(flops_price: float) -> tuple[list[list[Run]], float]:
        costs = costs_at(flops_price) if price_latents else unpriced
        cuts = [cut_into_runs(layers, own, flops_price) for own in costs]
        return cuts, sum(own[run].flops for own, runs in zip(costs, cuts, strict=True) for run in runs)

    return lowest_price(cut, budget)


def lowest_price(at: Callable[[float], tuple[T, float]], budget: float | None, highest: float = 1.0) -> T:
    """What ``at`` gives at the lowest price for which what it spends keeps to the budget; at ``highest`` if none does."""
    free, spent = at(0.0)
    if budget is None or spent <= budget:
        return free
    low, high = 1e-18, highest
    for _ in range(_PRICE_SEARCHES):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if at(middle)[1] <= budget else (middle, high)
    return at(high)[0]


def allocate_bits_and_flops(
    variances: Sequence[Tensor], flops_per_latent: Sequence[float], budget_bits: int, flops_budget: float
) -> list[Tensor]:
    """Bits 0 to 8, int64, for every latent of several blocks that share budgets of bits and of FLOPs per token.

    Args:
        variances: weighted variance of each latent, ``[R]`` for every block.
        flops_per_latent: what a latent of the block costs that has any bits.
        budget_bits, flops_budget: never exceeded, unless even one bit in all takes more FLOPs.
    """
    flat = torch.cat([v.double() for v in variances])
    flops = torch.cat(
        [torch.full((len(v),), f, dtype=torch.float64) for v, f in zip(variances, flops_per_latent, strict=True)]
    )

    def at(flops_price: float) -> tuple[Tensor, float]:
        def bits_at(price: float) -> tuple[Tensor, float]:
            bits = bits_at_price(flat, price, flops_price * flops)
            return bits, float(bits.sum())

        bits = lowest_price(bits_at, budget_bits, highest=float(flat.max()))
        return bits, float(flops[bits > 0].sum())

    return list(lowest_price(at, flops_budget).split([len(v) for v in variances]))


def _widest(layers: int, side: Mapping[Run, Candidate]) -> list[Run]:
    """Any cover to begin with: from each place the longest run."""
    runs, place = [], 0
    while place < layers:
        run = max((r for r in side if r.first == place), key=lambda r: (r.count, -r.parts))
        runs.append(run)
        place += run.count
    return runs
