"""Packing by the backend of the tensor's device."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from ..backend import backend_for
from ...layout import SegmentLayout
from . import cpu, torch_planes


def pack(u: Tensor, layout: SegmentLayout) -> Tensor:
    """Bytes uint8 ``[..., size]`` of stored values ``u`` ``[..., page_tokens, R]``."""
    return _kernel(u).pack(u, layout)


def unpack(data: Tensor, layout: SegmentLayout) -> Tensor:
    """Stored values float32 ``[..., page_tokens, R]`` of bytes ``[..., size]``; ``data`` may be strided."""
    return _kernel(data).unpack(data, layout)


def _kernel(x: Tensor) -> ModuleType:
    # The specification takes single pages; what it stands in for elsewhere is checked against it in the tests.
    return cpu if backend_for(x.device) == "cpu" else torch_planes
