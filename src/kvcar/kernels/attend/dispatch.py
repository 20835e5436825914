"""Attention by the backend that ``kernels.backend`` chose; what a compiled kernel does not serve goes to PyTorch, and is told."""

from __future__ import annotations

from torch import Tensor

from ..backend import Backend, backend_for, tell_once
from . import cpu, naive, tiled
from .inputs import ExactPast, PagedPast


def attend(
    query: Tensor,
    exact: ExactPast,
    paged: PagedPast | None,
    scaling: float,
    softcap: float | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Same as ``naive.attend``, by ``backend``, or by the one of the query's device."""
    backend = backend or backend_for(query.device)
    if backend in ("cpu", "triton") and paged is not None:
        return _compiled(backend, query, exact, paged, scaling, softcap)
    plain = naive if backend == "naive" else tiled
    return plain.attend(query, exact.joined(), None if paged is None else paged.gathered(), scaling, softcap)


def _compiled(
    backend: Backend, query: Tensor, exact: ExactPast, paged: PagedPast, scaling: float, softcap: float | None
) -> Tensor:
    if backend == "triton":
        from . import triton as kernel  # only here: importing it needs Triton
    else:
        kernel = cpu
    reason = kernel.serves(query, paged)
    if reason is not None:
        tell_once("attention", backend, reason)
        return tiled.attend(query, exact.joined(), paged.gathered(), scaling, softcap)
    # The C kernel reads pages, sinks and window where they lie.
    return kernel.attend_served(query, exact if backend == "cpu" else exact.joined(), paged, scaling, softcap)
