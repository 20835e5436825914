"""Decode attention over pages in compiled C, for CPUs: one pass over the packed bytes, split among torch's threads.

For passes of few query tokens. A tile's keys are decoded once for all query heads that share them, rotated and scored while they
are in cache; values are summed as latents. Keys of models without rotary positions are never decoded. What is not served
here (prefill, codecs whose decoder is not affine, latents of 16 bits) is told by ``serves``.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

from torch import Tensor

from ...errors import KernelError
from . import tiled
from .inputs import ExactPast, PagedPast, Reader
from .native_inputs import NativeJob

# Rounding decoders of keys to 8 bits doubles the speed of what takes longest; see decode8.py.
IN_8_BITS = True
_MOST_ROWS = 64
_jobs: WeakKeyDictionary[Reader, NativeJob] = WeakKeyDictionary()


def serves(query: Tensor, paged: PagedPast | None) -> str | None:
    """Why this kernel cannot do it, None if it can.

    Args:
        query: ``[B, Hq, T, D]``.
        paged: what to attend to.
    """
    if query.device.type != "cpu":
        return f"the query is on {query.device.type}"
    if paged is None:
        return None
    if query.shape[2] > 1 and query.shape[1] // _kv_heads(paged) * query.shape[2] > _MOST_ROWS:
        return "many query tokens are faster as matrix products"
    for readers in (paged.key_readers, paged.value_readers):
        for reader in readers:
            if not reader.affine_in_codes:
                return "a codec is not affine in its codes"
            if reader.segment.raw:
                return "latents of 16 bits"
    return None


def attend(
    query: Tensor, exact: ExactPast, paged: PagedPast | None, scaling: float, softcap: float | None = None
) -> Tensor:
    """Same as ``naive.attend``.

    Raises:
        KernelError: see ``serves``; or the kernels cannot be compiled.
    """
    reason = serves(query, paged)
    if reason is not None:
        raise KernelError(f"the CPU kernel of attention does not serve this: {reason}")
    if paged is None:
        return tiled.attend(query, exact.joined(), None, scaling, softcap)
    return attend_served(query, exact, paged, scaling, softcap)


def attend_served(
    query: Tensor, exact: ExactPast, paged: PagedPast, scaling: float, softcap: float | None = None
) -> Tensor:
    """Same as ``attend`` of what ``serves`` has nothing against."""
    out = _job(paged, query.shape[3]).run(query.float().contiguous(), exact, paged, scaling, softcap)
    return out.to(query.dtype)


def _kv_heads(paged: PagedPast) -> int:
    return sum(len(reader.heads) for reader in paged.key_readers)


def _job(paged: PagedPast, head_dim: int) -> NativeJob:
    """What stays the same from step to step, made once for a layer."""
    key = paged.key_readers[0]
    job = _jobs.get(key)
    if job is None or not job.is_for(paged):
        job = _jobs[key] = NativeJob(paged, head_dim, IN_8_BITS)
    return job
