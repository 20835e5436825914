"""How alike the heads of adjacent layers are: the statistics behind the paper's Algorithm 2.

Source: KV-CAR (arXiv 2512.06727), Algorithm 2 (mean L1 distance over calibration text); linear CKA: Kornblith et al.
2019 (arXiv 1905.00414). Keys are compared before RoPE, as they are stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import InputError
from ..models.geometry import read_geometry
from .reuse import MEASURES, Candidate
from ..progress import OnProgress, counter, silent
from ..geometry import KINDS, Kind, KVGeometry, Slot
from ..fit.capture import capture

_RIDGE = 1e-6


@dataclass(frozen=True)
class Similarity:
    """Distances between the heads of each layer and of the codable layer below it.

    Attributes:
        geometry: of the model.
        distances: measure -> (upper layer, kind) -> float64 ``[H, H]``, row: head of the upper layer, column: head of
            the lower. All fall with similarity: "l1" (mean absolute difference of elements), "relative_l1" (the same
            over the upper head's mean absolute value), "cosine" (1 - mean cosine), "cka" (1 - linear CKA),
            "prediction" (share of the upper head's variance that no linear map of the lower head gives).
        tokens: tokens compared.
    """

    geometry: KVGeometry
    distances: dict[str, dict[tuple[int, Kind], Tensor]]
    tokens: int

    def candidates(self, measure: str, any_head: bool = False) -> list[Candidate]:
        """For every slot that has a layer below: the head there that is nearest by ``measure``, and how near.

        Args:
            measure: one of ``MEASURES``.
            any_head: consider all heads below, not only the one of the same number as the paper does.

        Raises:
            InputError: the measure is not known.
        """
        if measure not in self.distances:
            raise InputError(f"unknown measure {measure!r}; known are: {', '.join(MEASURES)}")
        found = []
        for (layer, kind), matrix in self.distances[measure].items():
            below = _below(self.geometry, layer)
            for head in range(self.geometry.kv_heads):
                other = int(matrix[head].argmin()) if any_head else head
                slot, source = Slot(layer, head, kind), Slot(below, other, kind)
                found.append(Candidate(slot, source, float(matrix[head, other])))
        return found


@torch.no_grad()
def measure_similarity(
    model: PreTrainedModel, windows: Tensor, sinks: int = 4, on_progress: OnProgress = silent
) -> Similarity:
    """Compare heads over ``windows`` int64 ``[N, context]``, one pass.

    Raises:
        InputError: the model has fewer than two layers to compare.
        FitError: keys or values are NaN or infinite.
    """
    geometry = read_geometry(model.config)
    pairs = list(_pairs(geometry))
    if not pairs:
        raise InputError("reuse needs at least two layers that attend to the whole past; this model has fewer")
    stats = [_PairStatistics(geometry.kv_heads, geometry.head_dim) for _ in pairs]
    blocks = [_slots(geometry, below, layer, kind) for below, layer, kind in pairs]
    count = counter(on_progress, "compare heads", windows.shape[0] * (windows.shape[1] - sinks))
    for tokens in capture(model, geometry, windows, blocks, sinks, lambda index, x: stats[index].add(x)):
        count(tokens)
    distances: dict[str, dict[tuple[int, Kind], Tensor]] = {measure: {} for measure in MEASURES}
    for (_, layer, kind), each in zip(pairs, stats, strict=True):
        for measure, matrix in each.distances().items():
            distances[measure][layer, kind] = matrix
    return Similarity(geometry, distances, stats[0].tokens)


def _pairs(geometry: KVGeometry) -> Iterator[tuple[int, int, Kind]]:
    layers = geometry.codable_layers
    for below, layer in pairwise(layers):
        for kind in KINDS:
            yield below, layer, kind


def _below(geometry: KVGeometry, layer: int) -> int:
    layers = geometry.codable_layers
    return layers[layers.index(layer) - 1]


def _slots(geometry: KVGeometry, below: int, layer: int, kind: Kind) -> tuple[Slot, ...]:
    return tuple(Slot(each, head, kind) for each in (below, layer) for head in range(geometry.kv_heads))


class _PairStatistics:
    """Running sums for one pair of layers and one kind."""

    def __init__(self, heads: int, head_dim: int) -> None:
        self._heads, self._dim = heads, head_dim
        width = 2 * heads * head_dim
        self._l1 = torch.zeros(heads, heads, dtype=torch.float64)
        self._cosine = torch.zeros(heads, heads, dtype=torch.float64)
        self._size = torch.zeros(heads, 1, dtype=torch.float64)
        self._sum = torch.zeros(width, dtype=torch.float64)
        self._outer = torch.zeros(width, width, dtype=torch.float64)
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """Take in vectors ``[N, 2 H D]``: the lower layer's heads, then the upper's."""
        x = x.cpu()
        lower, upper = x.unflatten(-1, (2, self._heads, self._dim)).unbind(1)
        for head in range(self._heads):
            own = upper[:, head, None]
            self._l1[head] += (own - lower).abs().mean(-1).sum(0).double()
            self._cosine[head] += torch.cosine_similarity(own, lower, dim=-1).sum(0).double()
            self._size[head] += own.abs().mean(-1).sum().double()
        wide = x.double()
        self._sum += wide.sum(0)
        self._outer.addmm_(wide.T, wide)
        self.tokens += len(x)

    def distances(self) -> dict[str, Tensor]:
        """Every measure, float64 ``[H, H]``."""
        l1 = self._l1 / self.tokens
        cka, prediction = self._from_covariance()
        return {
            "l1": l1,
            "relative_l1": l1 / (self._size / self.tokens).clamp_min(1e-12),
            "cosine": 1 - self._cosine / self.tokens,
            "cka": cka,
            "prediction": prediction,
        }

    def _from_covariance(self) -> tuple[Tensor, Tensor]:
        mean = self._sum / self.tokens
        covariance = self._outer / self.tokens - torch.outer(mean, mean)
        # [2, H, D, 2, H, D]: (lower or upper, head, element) twice.
        parts = covariance.view(2, self._heads, self._dim, 2, self._heads, self._dim)
        cka = torch.zeros(self._heads, self._heads, dtype=torch.float64)
        prediction = torch.zeros_like(cka)
        for i in range(self._heads):
            own = parts[1, i, :, 1, i]
            for j in range(self._heads):
                other, cross = parts[0, j, :, 0, j], parts[1, i, :, 0, j]
                cka[i, j] = 1 - cross.square().sum() / (own.norm() * other.norm()).clamp_min(1e-12)
                ridge = _RIDGE * other.diagonal().mean() * torch.eye(self._dim, dtype=torch.float64)
                explained = (cross @ torch.linalg.solve(other + ridge, cross.T)).diagonal().sum()
                prediction[i, j] = 1 - explained / own.diagonal().sum().clamp_min(1e-12)
        return cka, prediction
