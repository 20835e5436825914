"""Second moments of a kind's vectors over all layers, of every pair of layers that might share a block."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..processes import from_first, joined_rows, total


class LayerMoments:
    """Means, covariances within ``band`` layers of each other, and a thin sample, accumulated as vectors stream by.

    Products are taken in float32, a window at a time, about the first window's mean, and summed in float64. Memory is
    ``layers * band * W**2 * 8`` bytes for ``W`` elements of a layer, less a corner.

    Args:
        layers: layer indices, ascending; vectors of a window arrive in this order.
        width: ``W``.
        band: layers of the longest block that may be asked for.
        stride: distance between sampled tokens.
    """

    def __init__(self, layers: Sequence[int], width: int, band: int, stride: int) -> None:
        self.layers, self.width, self.band = tuple(layers), width, min(band, len(layers))
        self._place = {layer: i for i, layer in enumerate(self.layers)}
        self._stride = stride
        self.count = 0
        self._shift: dict[int, Tensor] = {}
        self._sums = torch.zeros(len(self.layers), width, dtype=torch.float64)
        self._outer: dict[tuple[int, int], Tensor] = {}
        self._recent: dict[int, Tensor] = {}
        self._samples: list[list[Tensor]] = [[] for _ in self.layers]
        self._moved: dict[int, Tensor] = {}

    def add(self, layer: int, x: Tensor) -> None:
        """Take in one layer's vectors ``[N, W]`` of a window."""
        place = self._place[layer]
        if place not in self._shift:
            self._shift[place] = x.mean(0)
        centred = x - self._shift[place]
        self._sums[place] += centred.sum(0).double().cpu()
        self._recent = {p: v for p, v in self._recent.items() if place - self.band < p < place} | {place: centred}
        for other, vectors in self._recent.items():
            product = (vectors.T @ centred).double().cpu()
            key = (other, place)
            self._outer[key] = self._outer[key].add_(product) if key in self._outer else product
        self._samples[place].append(x[(-self.count) % self._stride :: self._stride].float().cpu().clone())
        if place == len(self.layers) - 1:
            self.count += len(x)
            self._recent = {}

    def reduce(self) -> None:
        """Take in what the other processes saw; all then hold the same."""
        count, sums = self.count, self._sums.clone()
        for place in range(len(self.layers)):
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

    def mean(self, layers: Sequence[int]) -> Tensor:
        """Mean float64 ``[len(layers) * W]``."""
        places = [self._place[layer] for layer in layers]
        return torch.cat([self._shift[p].double().cpu() + self._sums[p] / self.count for p in places])

    def covariance(self, layers: Sequence[int]) -> Tensor:
        """Covariance float64 ``[n * W, n * W]`` of ``n`` ascending layers, at most ``band`` apart."""
        places, w = [self._place[layer] for layer in layers], self.width
        result = torch.empty(len(places) * w, len(places) * w, dtype=torch.float64)
        for i, p in enumerate(places):
            for j, q in enumerate(places[i:], i):
                own = self._outer[p, q] / self.count - torch.outer(self._sums[p], self._sums[q]) / self.count**2
                result[i * w : (i + 1) * w, j * w : (j + 1) * w] = own
                result[j * w : (j + 1) * w, i * w : (i + 1) * w] = own.T
        return result

    def sample(self, layers: Sequence[int]) -> Tensor:
        """Sampled vectors float32 ``[S, len(layers) * W]``, in the order of the text."""
        return torch.cat([torch.cat(self._samples[self._place[layer]]) for layer in layers], dim=1)
