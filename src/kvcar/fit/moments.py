"""Mean, covariance and a thin sample of a block's vectors, accumulated as they stream by."""

from __future__ import annotations

import torch
from torch import Tensor


class Moments:
    """Second moments in float64 of vectors ``[*, W]``, plus every ``stride``-th vector as a sample.

    Sums are taken about the first batch's mean, so that a large mean does not drown a small variance.

    Args:
        width: ``W``.
        stride: distance between sampled tokens.

    Attributes:
        metrics: what errors cost, where that was measured: matrices that follow each other on the diagonal.
    """

    def __init__(self, width: int, stride: int) -> None:
        self.count = 0
        self.metrics: list[Tensor] | None = None
        self._stride = stride
        self._shift: Tensor | None = None
        self._sum = torch.zeros(width, dtype=torch.float64)
        self._outer = torch.zeros(width, width, dtype=torch.float64)
        self._samples: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        """Take in vectors ``[N, W]``."""
        if self._shift is None:
            self._shift = x.double().mean(0).cpu()
        centred = x.double().cpu() - self._shift
        self._sum += centred.sum(0)
        self._outer.addmm_(centred.T, centred)
        self._samples.append(x[(-self.count) % self._stride :: self._stride].float().cpu().clone())
        self.count += len(x)

    @property
    def mean(self) -> Tensor:
        """Mean, float64 ``[W]``."""
        assert self._shift is not None
        return self._shift + self._sum / self.count

    @property
    def covariance(self) -> Tensor:
        """Covariance, float64 ``[W, W]``."""
        mean = self._sum / self.count
        return self._outer / self.count - torch.outer(mean, mean)

    @property
    def sample(self) -> Tensor:
        """Sampled vectors, float32 ``[S, W]``, in the order of the text."""
        return torch.cat(self._samples)
