"""The structs of ``native/attend.c``."""

from __future__ import annotations

import ctypes

_I32, _I64, _POINTER, _F32 = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p, ctypes.c_float


class Reader(ctypes.Structure):
    """``Reader`` of ``attend.c``: how a segment of the page gives some heads."""

    _fields_ = [
        ("offset", _I64),
        *((name, _I32) for name in ("latents", "planes", "heads", "exact", "stops_stride", "spare")),
        *((name, _POINTER) for name in ("plane", "head", "matrix", "bias", "narrow", "scale", "stops", "query", "constant")),
        ("sums", _POINTER),
    ]  # fmt: skip


class Arena(ctypes.Structure):
    """``Arena`` of ``attend.c``: a run of pages."""

    _fields_ = [("base", _POINTER), *((name, _I64) for name in ("batch_stride", "page_stride", "pages", "page_bytes"))]


class Side(ctypes.Structure):
    """``Side`` of ``attend.c``: keys or values held exactly, by strides in elements."""

    _fields_ = [("base", _POINTER), ("batch_stride", _I64), ("head_stride", _I64), ("token_stride", _I64)]


class Part(ctypes.Structure):
    """``Part`` of ``attend.c``: tokens held exactly."""

    _fields_ = [("keys", Side), ("values", Side), ("tokens", _I64), ("is_bfloat16", _I32), ("spare", _I32)]


class Job(ctypes.Structure):
    """``Job`` of ``attend.c``: everything of one call."""

    _fields_ = [
        *((name, _I32) for name in ("batch", "heads", "rows", "head_dim", "page_tokens", "pairs", "splits", "threads")),
        ("tokens", _I64), ("first", _POINTER), ("offset", _POINTER), ("page_index", _POINTER),
        ("fine_cos", _POINTER), ("fine_sin", _POINTER), ("coarse_cos", _POINTER), ("coarse_sin", _POINTER),
        ("scaling", _F32), ("softcap", _F32), ("key_readers", _I32), ("value_readers", _I32), ("arenas", _I32),
        ("keys", _POINTER), ("values", _POINTER), ("arena", _POINTER), ("most", _POINTER), ("mass", _POINTER),
        ("query", _POINTER), ("part", _POINTER), ("mask", _POINTER),
        ("mask_batch_stride", _I64), ("mask_row_stride", _I64), ("mask_token_stride", _I64), ("mask_rows", _I32),
        ("parts", _I32), ("scattered", _I32), ("spare", _I32), ("out", _POINTER),
    ]  # fmt: skip
