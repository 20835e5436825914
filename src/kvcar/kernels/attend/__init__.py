"""Attention over a compressed past: sinks and window exact, pages decoded tile by tile."""

from __future__ import annotations

from torch import Tensor

from ..backend import Backend, backend_for
from . import naive as naive
from . import tiled as tiled
from .inputs import (
    ATTENTION,
    READ_TABLES,
    Buffered,
    ExactPast,
    PagedPast,
    Reader,
    RoundedDecoder,
    all_heads,
    turned_keys,
)

__all__ = [
    "ATTENTION",
    "Buffered",
    "ExactPast",
    "PagedPast",
    "Reader",
    "RoundedDecoder",
    "all_heads",
    "attend",
    "case_of",
    "turned_keys",
]

STEP_ROWS = 64


def attend(
    query: Tensor,
    exact: ExactPast,
    paged: PagedPast | None,
    scaling: float,
    softcap: float | None = None,
    backend: Backend | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Compute the same as ``naive.attend``, by ``backend``, or by the one of the query's device."""
    # Kernels of steps take one beginning of the past for all of a sequence's queries, as a single token has it anyway.
    stepwise = paged is not None and paged.since is None
    run = ATTENTION.choose(
        backend or backend_for(query.device), case_of(query, exact.keys.shape[1], stepwise), query, paged
    )
    if paged is not None and paged.table is not None and run not in READ_TABLES:
        paged = paged.in_order()
    return run(query, exact, paged, scaling, softcap, sinks)


def case_of(query: Tensor, kv_heads: int, has_pages: bool = True) -> str:
    """Name the case: "step" for one query token or at most ``STEP_ROWS`` query rows of a KV head, else "chunk".

    A step reads every byte of the pages for few rows, so kernels unpack, use and forget them. In a chunk's many rows
    products over whole tiles are faster; without pages there is nothing to unpack.
    """
    rows = query.shape[1] // kv_heads * query.shape[2]
    return "step" if has_pages and (query.shape[2] == 1 or rows <= STEP_ROWS) else "chunk"
