"""The search in compiled C."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..native import native_library
from .search import SEARCH

_I32, _I64, _POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p


class _Search(ctypes.Structure):
    _fields_ = [
        ("targets", _POINTER), ("highest", _POINTER), ("states", _POINTER), ("levels", _POINTER),
        ("pages", _I64), *((name, _I32) for name in ("tokens", "latents", "threads", "spare")),
    ]  # fmt: skip


@SEARCH.register("cpu")
def search(targets: Tensor, highest: Tensor, states: Tensor | None) -> Tensor:
    """Compute the same as ``search.search``, but for ties.

    Raises:
        KernelError: the kernels cannot be compiled.
        MemoryError: none is left for scratch.
    """
    targets, highest, levels = targets.contiguous(), highest.contiguous(), torch.empty_like(targets).contiguous()
    begun = None if states is None else states.contiguous()
    job = _Search(
        targets=targets.data_ptr(), highest=highest.data_ptr(), states=None if begun is None else begun.data_ptr(),
        levels=levels.data_ptr(), pages=targets.shape[0], tokens=targets.shape[1], latents=targets.shape[2],
        threads=torch.get_num_threads(),
    )  # fmt: skip
    if targets.numel() and native_library().kvcar_search_trellis(ctypes.byref(job)):
        raise MemoryError("no memory for the scratch of a trellis")
    return levels
