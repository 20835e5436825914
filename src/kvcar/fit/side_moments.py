"""Second moments of keys and values over all layers, of every pair of sides that might share a block."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .processes import from_first, joined_rows, total
from ..geometry import Side


class SideMoments:
    """Means, covariances of sides near each other, and a thin sample, accumulated as vectors stream by.

    Products are taken in float32, a window at a time, about the first window's mean, and summed in float64. Memory is
    ``W**2 * 8`` bytes for every pair of sides near enough to share a block, ``W`` being the elements of a side.

    Args:
        sides: (layer, kind), in the order in which the vectors of a window arrive: layers ascending.
        width: ``W``.
        band: layers of the longest block of one kind that may be asked for, at least 1.
        shared_band: layers of the longest block that keys and values share; 0 for none.
        stride: distance between sampled tokens.
    """

    def __init__(self, sides: Sequence[Side], width: int, band: int, shared_band: int, stride: int) -> None:
        self.sides, self.width = tuple(sides), width
        self._place = {side: i for i, side in enumerate(self.sides)}
        layers = sorted({layer for layer, _ in self.sides})
        self._depth = {layer: i for i, layer in enumerate(layers)}
        self._band, self._shared_band = band, shared_band
        self._stride = stride
        self.count = 0
        self._shift: dict[int, Tensor] = {}
        self._sums = torch.zeros(len(self.sides), width, dtype=torch.float64)
        self._outer: dict[tuple[int, int], Tensor] = {}
        self._recent: dict[int, Tensor] = {}
        self._samples: list[list[Tensor]] = [[] for _ in self.sides]
        self._moved: dict[int, Tensor] = {}

    def add(self, side: Side, x: Tensor) -> None:
        """Take in one side's vectors ``[N, W]`` of a window."""
        place = self._place[side]
        if place not in self._shift:
            self._shift[place] = x.mean(0)
        centred = x - self._shift[place]
        self._sums[place] += centred.sum(0).double().cpu()
        self._recent = {p: v for p, v in self._recent.items() if self._apart(p, place) < self._longest} | {
            place: centred
        }
        wanted = [p for p in self._recent if self._may_share(p, place)]
        # One product for all of them: many narrow ones take several times as long.
        products = (torch.cat([self._recent[p] for p in wanted], dim=1).T @ centred).double().cpu()
        for other, product in zip(wanted, products.split(self.width), strict=True):
            key = (other, place)
            self._outer[key] = self._outer[key].add_(product) if key in self._outer else product.clone()
        self._samples[place].append(x[(-self.count) % self._stride :: self._stride].float().cpu().clone())
        if place == len(self.sides) - 1:
            self.count += len(x)
            self._recent = {}

    def reduce(self) -> None:
        """Take in what the other processes saw; all then hold the same."""
        count, sums = self.count, self._sums.clone()
        for place in range(len(self.sides)):
            shift = self._shift[place].double().cpu()
            common = from_first(shift)
            # Sums about another point: exact in what is known about this one.
            self._shift[place], self._moved[place] = common, shift - common
            self._sums[place] = total(sums[place] + count * self._moved[place])
        for (p, q), outer in self._outer.items():
            a, b = self._moved[p], self._moved[q]
            outer += torch.outer(sums[p], b) + torch.outer(a, sums[q]) + count * torch.outer(a, b)
            self._outer[p, q] = total(outer)
        self.count = int(total(torch.tensor(count)))
        self._samples = [[joined_rows(torch.cat(parts))] for parts in self._samples]
        self._moved = {}

    def mean(self, sides: Sequence[Side]) -> Tensor:
        """Mean float64 ``[len(sides) * W]``."""
        places = [self._place[side] for side in sides]
        return torch.cat([self._shift[p].double().cpu() + self._sums[p] / self.count for p in places])

    def covariance(self, sides: Sequence[Side]) -> Tensor:
        """Covariance float64 ``[n * W, n * W]`` of ``n`` sides in the order of their arrival, near enough to share a block."""
        places, w = [self._place[side] for side in sides], self.width
        result = torch.empty(len(places) * w, len(places) * w, dtype=torch.float64)
        for i, p in enumerate(places):
            for j, q in enumerate(places[i:], i):
                own = self._outer[p, q] / self.count - torch.outer(self._sums[p], self._sums[q]) / self.count**2
                result[i * w : (i + 1) * w, j * w : (j + 1) * w] = own
                result[j * w : (j + 1) * w, i * w : (i + 1) * w] = own.T
        return result

    def sample(self, sides: Sequence[Side]) -> Tensor:
        """Sampled vectors float32 ``[S, len(sides) * W]``, in the order of the text."""
        return torch.cat([torch.cat(self._samples[self._place[side]]) for side in sides], dim=1)

    @property
    def _longest(self) -> int:
        return max(self._band, self._shared_band)

    def _apart(self, p: int, q: int) -> int:
        """Layers from one place to another."""
        return abs(self._depth[self.sides[p][0]] - self._depth[self.sides[q][0]])

    def _may_share(self, p: int, q: int) -> bool:
        near = self._apart(p, q)
        return near < self._shared_band or (self.sides[p][1] == self.sides[q][1] and near < self._band)
