"""The choice of pages in compiled C, for CPUs: scores, votes and the pages with most of them in one call.

Summaries of two vectors a page, and such as are not float16, are not served.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ...errors import KernelError
from ..native import native_library
from .summaries import Summary

_I32, _I64, _POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p


def serves(query: Tensor, summaries: Tensor, summary: Summary) -> str | None:
    """Why this kernel cannot do it, None if it can; see ``naive.choose_pages`` for the arguments."""
    if not summary.is_product:
        return "scores of this summary are no products"
    if summaries.dtype != torch.float16 or query.device.type != "cpu":
        return f"summaries are {summaries.dtype} and queries on {query.device.type}"
    return None


def choose_pages(
    query: Tensor,
    summaries: Tensor,
    summary: Summary,
    scaling: float,
    most: int,
    hidden_pages: Tensor,
    with_next: bool,
) -> Tensor:
    """Same as ``naive.choose_pages``; of pages with equally many votes, the first ones.

    Raises:
        KernelError: see ``serves``; or more pages are to be taken than there are.
    """
    reason = serves(query, summaries, summary)
    if reason is not None:
        raise KernelError(f"the CPU kernel of page selection does not serve this: {reason}")
    return choose_served(query, summaries, scaling, most, hidden_pages, with_next)


def choose_served(
    query: Tensor, summaries: Tensor, scaling: float, most: int, hidden_pages: Tensor, with_next: bool
) -> Tensor:
    """Same as ``choose_pages`` of what ``serves`` has nothing against."""
    batch, heads, pages, dim = summaries.shape
    if not with_next <= most <= pages + with_next:
        raise KernelError(f"cannot choose {most} of {pages + with_next} pages")
    if summaries.stride(3) != 1 or summaries.stride(2) != dim:
        summaries = summaries.contiguous()
    # Both are the same tensors again wherever they are float and contiguous already.
    rows, hidden = query.float().contiguous(), hidden_pages.contiguous()
    out = torch.empty(batch, most, dtype=torch.int64)
    batch_stride, head_stride, _, _ = summaries.stride()
    failed = _kernel()(
        batch, heads, query.shape[1] // heads * query.shape[2], dim, pages, rows.data_ptr(), summaries.data_ptr(),
        batch_stride, head_stride, scaling, most, hidden.data_ptr(), with_next, out.data_ptr(),
    )  # fmt: skip
    if failed:
        raise MemoryError("no memory for the scratch of page selection")
    return out


@cache
def _kernel() -> Any:
    kernel = native_library().kvcar_select
    kernel.argtypes = [
        _I32, _I32, _I32, _I32, _I64, _POINTER, _POINTER, _I64, _I64, ctypes.c_float, _I32, _POINTER, _I32, _POINTER,
    ]  # fmt: skip
    return kernel
