"""What the errors of a page's tokens have in common, in 2 bits an element: packing and reading it.

Codes 0 to 3 stand for -1.5, -0.5, 0.5 and 1.5 steps; the step of a page is the root mean square of its mean error, so that a
page that has none, as one that is not yet full, reads as 0. Elements are over a scale of their own, which is the codec's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..layout import MEAN_STEP_BYTES, MEANS_PER_BYTE, MeansLayout

MIDDLE_CODE = 1.5
_LARGEST_STEP = 65504.0
_SHIFTS = (0, 2, 4, 6)


def pack_means(means: Tensor) -> Tensor:
    """Bytes uint8 ``[..., size]`` of mean errors over their elements' scales, float32 ``[..., W]``."""
    step = means.square().mean(-1, keepdim=True).sqrt().clamp_max(_LARGEST_STEP).to(torch.float16)
    codes = (means / step.float().clamp_min(torch.finfo(torch.float32).tiny) + MIDDLE_CODE).round().clamp(0, 3)
    codes = pad(codes.to(torch.uint8), (0, -means.shape[-1] % MEANS_PER_BYTE)).unflatten(-1, (-1, MEANS_PER_BYTE))
    shifts = torch.tensor(_SHIFTS, dtype=torch.uint8, device=means.device)
    packed = (codes << shifts).sum(-1, dtype=torch.uint8)
    return torch.cat([step.contiguous().view(torch.uint8), packed], dim=-1)


def unpack_means(data: Tensor, width: int) -> Tensor:
    """Mean errors over their elements' scales, float32 ``[..., width]``, of what ``pack_means`` gave."""
    step = data[..., :MEAN_STEP_BYTES].contiguous().view(torch.float16).float()
    shifts = torch.tensor(_SHIFTS, dtype=torch.uint8, device=data.device)
    codes = ((data[..., MEAN_STEP_BYTES:, None] >> shifts) & 3).flatten(-2)[..., :width]
    return (codes.float() - MIDDLE_CODE) * step


def rounded_means(means: Tensor, scale: Tensor) -> Tensor:
    """Mean errors float32 ``[..., W]`` as they are read from a page, of elements with a scale ``[W]``."""
    return unpack_means(pack_means(means / scale), len(scale)) * scale


@dataclass(frozen=True, eq=False)
class PageMeans:
    """What every page adds to some decoded vectors of a unit.

    Attributes:
        layout: where the unit's lie in a page.
        columns: elements of the unit that are read, ``n`` of them.
        scale: of those elements, float32 ``[n]``.
    """

    layout: MeansLayout
    columns: slice | Tensor
    scale: Tensor

    def of(self, pages: Sequence[Tensor]) -> Tensor:
        """Float32 ``[B, pages, n]`` of consecutive ``pages`` uint8 ``[B, pages, page_bytes]``."""
        data = torch.cat([run[..., self.layout.offset : self.layout.end] for run in pages], dim=1)
        return unpack_means(data, self.layout.width)[..., self.columns] * self.scale
