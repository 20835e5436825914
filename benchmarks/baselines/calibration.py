"""What methods are fitted on: the model, windows of text, and statistics that several of them share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcar.fit.statistics import Statistics, collect_statistics, sample_stride
from kvcar.geometry import Slot
from kvcar.kernels.rotary import RotaryTable
from kvcar.models.geometry import geometry_of
from kvcar.models.rotation import learn_rotations
from kvcar.progress import OnProgress, silent

SINKS = 4
_SAMPLE_TOKENS = 512

Block = tuple[Slot, ...]


@dataclass(frozen=True)
class Principal:
    """Principal component analysis of a block.

    Attributes:
        mean: float32 ``[W]``.
        directions: orthonormal columns float32 ``[W, W]``, by falling variance.
        sample: coordinates of some of the text's tokens, float32 ``[S, W]``.
    """

    mean: Tensor
    directions: Tensor
    sample: Tensor


class Calibration:
    """A model and the text its methods are fitted on.

    Args:
        model: only run, never changed.
        windows: token ids int64 ``[N, context]``; the same that kvcar's fit reads.
        on_progress: told what is going on.
    """

    def __init__(self, model: PreTrainedModel, windows: Tensor, on_progress: OnProgress = silent) -> None:
        self.model, self.windows = model, windows
        self.geometry = geometry_of(model)
        self._tell = on_progress
        self._principal: dict[Block, Principal] = {}

    @cached_property
    def statistics(self) -> Statistics:
        """Moments and a sample of any block of one kind's vectors, keys before RoPE."""
        stride = sample_stride(self.windows, SINKS, _SAMPLE_TOKENS)
        bands = (len(self.geometry.codable_layers), 0)
        return collect_statistics(self.model, self.geometry, self.windows, bands, SINKS, stride, on_progress=self._tell)

    def principal(self, block: Block) -> Principal:
        """Principal directions of a block's vectors; computed once for each block."""
        if block not in self._principal:
            # In float32, twice as fast: directions whose variance drowns in its rounding are given no bits anyway.
            directions = torch.linalg.eigh(self.statistics.covariance(block).float()).eigenvectors.flip(1)
            mean = self.statistics.mean(block).float()
            self._principal[block] = Principal(mean, directions, (self.statistics.sample(block) - mean) @ directions)
        return self._principal[block]

    @cached_property
    def rotary(self) -> dict[int, RotaryTable]:
        """How each layer that attends to the whole past rotates its keys; empty for a model without RoPE."""
        return learn_rotations(self.model, self.geometry)
