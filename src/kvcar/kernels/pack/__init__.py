"""Packing stored values into page segments and back."""

from __future__ import annotations

from torch import Tensor

from ...layout import SegmentLayout
from ..backend import backend_for
from .planes import PACKING, UNPACKING

__all__ = ["PACKING", "UNPACKING", "pack", "unpack"]


def pack(u: Tensor, layout: SegmentLayout) -> Tensor:
    """Pack stored values ``u`` ``[..., page_tokens, R]`` into bytes uint8 ``[..., size]``."""
    return PACKING.choose(backend_for(u.device), "any")(u, layout)


def unpack(data: Tensor, layout: SegmentLayout) -> Tensor:
    """Unpack stored values float32 ``[..., page_tokens, R]`` of bytes ``[..., size]``; ``data`` may be strided."""
    return UNPACKING.choose(backend_for(data.device), "any")(data, layout)
