"""Structs of C that several kernels share."""

from __future__ import annotations

import ctypes
from typing import Self

from ...layout import Plane


class NativePlane(ctypes.Structure):
    """``Plane`` of ``unpack.h``."""

    _fields_ = [(name, ctypes.c_int32) for name in ("bits", "shift", "start", "count", "rows", "offset")]

    @classmethod
    def of(cls, plane: Plane) -> Self:
        """The same plane as C has it."""
        return cls(plane.bits, plane.shift, plane.start, plane.stop - plane.start, plane.rows, plane.offset)
