"""Attention over pages with Triton: for decoding on a GPU, and under Triton's interpreter for tests on a CPU.

Used where a caller chooses it, after ``serves`` has said that it can be; nothing imports it by itself. It needs the
extra ``kvcar[triton]``. ``TRITON_INTERPRET=1`` in the environment, before Triton is first imported, runs the kernels on
the CPU, slowly.

Two launches for a span of tokens, whatever the number of arenas: keys are decoded tile by tile for all query rows of
their heads, rotated, scored and thrown away; then each split of the span sums the stored values under its own online
softmax. One more attends to sinks and window, and a last one merges it with all splits by their log-sum-exp and decodes the
sums once per query row. Where keys need no rotation, queries are taken to the space of the stored values instead and no key
is decoded. ``docs/kernels.md`` says why in this order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import KernelError
from ..triton_planes import cannot_run_on
from ..triton_subnormals import multiplies_subnormals
from .inputs import ExactPast, PagedPast, Reader
from .triton_merge import SplitSums, attend_exactly, merge
from .triton_pages import PageTable, are_aligned, page_table
from .triton_scores import ELEMENT_TYPES, Call, Scorer, precision_of
from .triton_values import ValueSums

MOST_QUERY_TOKENS = 16
_SCORES_AT_ONCE = 2**26
_REASON = "why triton does not serve it"


def serves(query: Tensor, paged: PagedPast | None) -> str | None:
    """Why ``attend`` cannot take these inputs, or None if it can.

    Args:
        query: ``[B, Hq, T, D]``.
        paged: tokens held as pages, or None.
    """
    reason = cannot_run_on(query.device.type)
    if reason is not None:
        return reason
    if query.dtype not in ELEMENT_TYPES:
        return f"queries are {query.dtype}, not float32, bfloat16 or float16"
    if query.shape[2] > MOST_QUERY_TOKENS:
        return f"{query.shape[2]} query tokens are more than the {MOST_QUERY_TOKENS} of a decoding step"
    if paged is None:
        return None
    if query.dtype != torch.float32 and not multiplies_subnormals(query.device):
        return "the device takes subnormal float16 numbers, which codes are, for zero"
    if _REASON not in paged.kept:
        paged.kept[_REASON] = _refuses_past(paged)
    return paged.kept[_REASON]  # pyright: ignore[reportReturnType]


def _refuses_past(paged: PagedPast) -> str | None:
    if not are_aligned(paged.tiles):
        return "pages do not start at multiples of 16 bytes"
    reasons = (_refuses(reader, paged) for reader in (*paged.key_readers, *paged.value_readers))
    return next((reason for reason in reasons if reason is not None), None)


def _refuses(reader: Reader, paged: PagedPast) -> str | None:
    if reader.segment.lossless:
        unrotated = reader in paged.key_readers and paged.rotary is not None and not reader.rotated
        return "lossless keys are stored before RoPE" if unrotated else None
    if reader.affine is None:
        return "the decoder is not affine"
    if reader.restore is not None:
        return "scales are stored with every token (dynamic), and dequantisation must fold into the decoder"
    return None


def attend(
    query: Tensor, exact: ExactPast, paged: PagedPast | None, scaling: float, softcap: float | None = None
) -> Tensor:
    """Same as ``naive.attend``.

    Raises:
        KernelError: ``serves`` has a reason against these inputs.
    """
    reason = serves(query, paged)
    if reason is not None:
        raise KernelError(f"the Triton attention cannot be used: {reason}; choose another backend")
    return attend_served(query, exact, paged, scaling, softcap)


def attend_served(
    query: Tensor, exact: ExactPast, paged: PagedPast | None, scaling: float, softcap: float | None = None
) -> Tensor:
    """Same as ``attend`` of what ``serves`` has nothing against."""
    table = None if paged is None or paged.tokens == 0 else page_table(paged)
    return attend_table(query, exact, paged, table, scaling, softcap)


def attend_table(
    query: Tensor,
    exact: ExactPast,
    paged: PagedPast | None,
    table: PageTable | None,
    scaling: float,
    softcap: float | None = None,
) -> Tensor:
    """Same as ``attend_served``, of the pages that ``table`` tells of; what ``paged`` says of tiles and tokens is not used."""
    batch, _, _, head_dim = query.shape
    # Query heads that share a KV head become more query rows of it: [B, H, G * T, D].
    q = query.float().reshape(batch, exact.keys.shape[1], -1, head_dim).contiguous() * scaling
    out = torch.empty_like(q, dtype=query.dtype)
    half = query.dtype != torch.float32
    with torch.cuda.device_of(q):
        piece = attend_exactly(q, exact, precision_of(half), softcap)
        parts: list[SplitSums] = []
        if paged is not None and table is not None:
            parts = _paged_sums(Call(q, paged, table, half, softcap))
        merge(out, piece, parts)
    return out.view(query.shape)


def _paged_sums(call: Call) -> list[SplitSums]:
    """Softmax of the pages' tokens, span by span so that the scratch stays small."""
    scorer, values = Scorer(call), ValueSums(call)
    batch, heads, rows = call.q.shape[:3]
    span = max(1, _SCORES_AT_ONCE // (batch * heads * rows * values.split_tokens)) * values.split_tokens
    for start in range(0, call.table.places, span):
        stop = min(start + span, call.table.places)
        scores = torch.empty(batch, heads * rows, stop - start, device=call.q.device)
        scorer.write(scores, start, stop)
        values.add(scores, start, stop)
    return values.parts
