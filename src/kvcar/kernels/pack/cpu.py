"""Packing in compiled C, for CPUs: a call for all pages, where PyTorch takes several for each plane."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from ...layout import Plane, SegmentLayout
from ..native import native_library
from .planes import PACKING, UNPACKING, raw_bytes, raw_values

_I32, _I64, _POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p


class NativePlane(ctypes.Structure):
    """``Plane`` of ``unpack.h``."""

    _fields_ = [(name, _I32) for name in ("bits", "shift", "start", "count", "rows", "offset", "trellis")]

    @classmethod
    def of(cls, plane: Plane) -> Self:
        """Return the same plane as C has it."""
        return cls(
            plane.bits, plane.shift, plane.start, plane.stop - plane.start, plane.rows, plane.offset, plane.trellis
        )


class _Segments(ctypes.Structure):
    _fields_ = [
        ("data", _POINTER),
        *((name, _I64) for name in ("outer", "inner", "outer_stride", "inner_stride", "size")),
        ("values", _POINTER), ("planes", _POINTER),
        *((name, _I32) for name in ("n_planes", "tokens", "width", "raw", "threads", "spare")),
    ]  # fmt: skip


@PACKING.register("cpu")
def pack(u: Tensor, layout: SegmentLayout) -> Tensor:
    """Compute the same as ``naive.pack``, of any number of pages on a CPU.

    Raises:
        KernelError: the kernels cannot be compiled.
        MemoryError: none is left for scratch.
    """
    data = torch.empty(*u.shape[:-2], layout.size, dtype=torch.uint8)
    if layout.raw:
        raw = raw_bytes(u, layout)
        data[..., : raw.shape[-1]] = raw
    if layout.planes:
        _run("kvcar_pack", data.reshape(1, -1, layout.size), u.float().contiguous(), layout)
    return data


@UNPACKING.register("cpu")
def unpack(data: Tensor, layout: SegmentLayout) -> Tensor:
    """Compute the same as ``naive.unpack``, of any number of pages on a CPU; see ``pack`` for what it raises."""
    lead = data.shape[:-1]
    u = torch.empty(*lead, layout.page_tokens, layout.latents, dtype=torch.float32)
    if layout.raw:
        u[..., : layout.raw] = raw_values(data, layout)
    if layout.planes:
        pages = data if data.ndim == 3 else data.reshape(1, -1, data.shape[-1])
        _run("kvcar_unpack", pages if pages.stride(-1) == 1 else pages.contiguous(), u, layout)
    return u


def _run(function: str, data: Tensor, values: Tensor, layout: SegmentLayout) -> None:
    """Call ``function`` for pages uint8 ``[outer, inner, size]`` and their values, contiguous."""
    planes = _planes(layout.planes, layout.raw)
    segments = _Segments(
        data=data.data_ptr(), outer=data.shape[0], inner=data.shape[1], outer_stride=data.stride(0),
        inner_stride=data.stride(1), size=data.shape[2], values=values.data_ptr(), planes=ctypes.addressof(planes),
        n_planes=len(planes), tokens=layout.page_tokens, width=layout.latents, raw=layout.raw,
        threads=torch.get_num_threads(),
    )  # fmt: skip
    if getattr(native_library(), function)(ctypes.byref(segments)):
        raise MemoryError("no memory for the scratch of packing pages")


def _planes(planes: Sequence[Plane], raw: int) -> ctypes.Array[NativePlane]:
    made = (NativePlane.of(plane._replace(start=plane.start - raw, stop=plane.stop - raw)) for plane in planes)
    return (NativePlane * len(planes))(*made)
