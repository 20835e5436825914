"""KVTC's choice of groups of components and of each group's bits: dynamic programming for a budget of bits.

Source: arXiv 2511.01815. For a given price of a bit the best partition is found from the end of the components to their
start; the price is then found by bisection. That gives the partitions on the lower convex hull of error against bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvcar.errors import InputError

from .stored import HALF_BITS
from .uniform import dequantise, quantise

SIZES = (16, 64, 256, 1024)
WIDTHS = (0, 2, 4, 8)
SCALE_BITS = 2 * HALF_BITS
_STEPS = 60


@dataclass(frozen=True)
class Group:
    """``size`` components from ``start`` on, ``bits`` each, sharing a step and a least element in every token."""

    start: int
    size: int
    bits: int

    @property
    def stored_bits(self) -> int:
        """Bits of a token before entropy coding; a group without bits stores nothing at all."""
        return self.size * self.bits + SCALE_BITS if self.bits else 0


@dataclass(frozen=True)
class _Choice:
    group: Group
    error: float


def allocate_groups(sample: Tensor, budget_bits: int) -> tuple[Group, ...]:
    """Groups that are given bits, in the order of the components.

    Args:
        sample: coordinates float32 ``[S, W]`` of some tokens, by falling variance.
        budget_bits: bits of a token before entropy coding; never exceeded.

    Raises:
        InputError: the budget is too small for a single group.
    """
    choices = _choices(sample)
    best: tuple[Group, ...] = ()
    low, high = -60.0, 60.0  # powers of two: from a bit that costs nothing to one that nothing is worth
    for _ in range(_STEPS):
        middle = (low + high) / 2
        found = _partition(choices, sample.shape[1], 2.0**middle)
        if sum(g.stored_bits for g in found) <= budget_bits:
            best, high = found, middle
        else:
            low = middle
    if not best:
        raise InputError(f"{budget_bits} bits are too few for a group of components; ask for fewer times smaller")
    return best


def _choices(sample: Tensor) -> dict[int, list[_Choice]]:
    """By start: every group that may begin there, with the mean squared error of a token that it leaves."""
    width = sample.shape[1]
    found: dict[int, list[_Choice]] = {start: [] for start in range(0, width, SIZES[0])}
    for size in SIZES:
        for start in range(0, width, size):
            part = sample[:, start : start + size]
            found[start] += [_Choice(Group(start, part.shape[1], bits), _error(part, bits)) for bits in WIDTHS]
    return found


def _error(part: Tensor, bits: int) -> float:
    decoded = dequantise(*quantise(part, bits, dim=1)) if bits else torch.zeros_like(part)
    return float((part - decoded).square().sum(1).mean())


def _partition(choices: dict[int, list[_Choice]], width: int, price: float) -> tuple[Group, ...]:
    """The partition of least error plus ``price`` times bits, its groups without bits left out."""
    cost: dict[int, float] = {width: 0.0}
    taken: dict[int, Group] = {}
    for start in sorted(choices, reverse=True):
        ways = [
            (c.error + price * c.group.stored_bits + cost[start + c.group.size], index)
            for index, c in enumerate(choices[start])
        ]
        cost[start], index = min(ways)
        taken[start] = choices[start][index].group
    groups, start = [], 0
    while start < width:
        groups.append(taken[start])
        start += groups[-1].size
    return tuple(group for group in groups if group.bits)
