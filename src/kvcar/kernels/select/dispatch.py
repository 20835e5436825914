"""Choosing pages by the backend that ``kernels.backend`` chose; what a compiled kernel does not serve goes to PyTorch."""

from __future__ import annotations

from torch import Tensor

from ..backend import Backend, backend_for, tell_once
from . import cpu, naive
from .summaries import Summary


def choose_pages(
    query: Tensor,
    summaries: Tensor,
    summary: Summary,
    scaling: float,
    most: int,
    hidden_pages: Tensor,
    with_next: bool,
    backend: Backend | None = None,
) -> Tensor:
    """Same as ``naive.choose_pages``, by ``backend``, or by the one of the query's device."""
    if (backend or backend_for(query.device)) == "cpu":
        reason = cpu.serves(query, summaries, summary)
        if reason is None:
            return cpu.choose_served(query, summaries, scaling, most, hidden_pages, with_next)
        tell_once("page selection", "cpu", reason)
    return naive.choose_pages(query, summaries, summary, scaling, most, hidden_pages, with_next)
