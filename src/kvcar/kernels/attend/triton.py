"""Attention over pages with Triton: for decoding on a GPU, and under Triton's interpreter for tests on a CPU.

For steps, passes of few query tokens. Imported by the registry when the backend is asked for, as it needs the extra
``kvcar[triton]``. ``TRITON_INTERPRET=1`` in the environment, before Triton is first imported, runs the kernels on the
CPU, slowly.

Two launches for a span of tokens, whatever the number of arenas: keys are decoded tile by tile for all query rows of
their heads, rotated, scored and thrown away; then each split of the span sums the stored values under its own online
softmax. One more attends to sinks and window, and a last one merges it with all splits by their log-sum-exp and decodes
the sums once per query row. Where keys need no rotation, queries are taken to the space of the stored values instead
and no key is decoded. ``docs/kernels.md`` says why in this order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import KernelError
from ..triton_unpack import cannot_run_on, multiplies_subnormals
from .inputs import ATTENTION, ExactPast, PagedPast, Reader
from .triton_merge_kernels import exact_piece, merge_pieces
from .triton_paged import ELEMENT_TYPES, WARPS, Call, Scorer, SplitSums, ValueSums, precision_of
from .triton_tables import Bank, are_aligned, padded_columns, page_addresses, value_decoder

_SCORES_AT_ONCE = 2**26
_REASON = "why triton does not support it"
_ADDRESSES = "triton page addresses"
_TILE_TOKENS = 32
_ROWS = 16
# Elements of the products that a program of the merge has.
_PRODUCTS = 8192


def unsupported(query: Tensor, paged: PagedPast | None) -> str | None:
    """Say why ``attend`` cannot take these inputs, or None if it can."""
    reason = cannot_run_on(query.device.type)
    if reason is not None:
        return reason
    if query.dtype not in ELEMENT_TYPES:
        return f"queries are {query.dtype}, not float32, bfloat16 or float16"
    if paged is None:
        return None
    if query.dtype != torch.float32 and not multiplies_subnormals(query.device):
        return "the device takes subnormal float16 numbers, which codes are, for zero"
    if _REASON not in paged.kept:
        paged.kept[_REASON] = _unsupported_past(paged)
    return paged.kept[_REASON]  # pyright: ignore[reportReturnType]


def _unsupported_past(paged: PagedPast) -> str | None:
    if not are_aligned(paged.tiles):
        return "pages do not start at multiples of 16 bytes"
    reasons = (_unsupported_reader(reader, paged) for reader in (*paged.key_readers, *paged.value_readers))
    return next((reason for reason in reasons if reason is not None), None)


def _unsupported_reader(reader: Reader, paged: PagedPast) -> str | None:
    if reader.segment.lossless:
        unrotated = reader in paged.key_readers and paged.rotary is not None and not reader.rotated
        return "lossless keys are stored before RoPE" if unrotated else None
    if not reader.is_affine:
        return "the decoder is not affine"
    if reader.restore is not None:
        return "scales are stored with every token (dynamic), and dequantisation must fold into the decoder"
    return None


@ATTENTION.register("triton", "step", unsupported=unsupported)
def attend(
    query: Tensor,
    exact: ExactPast,
    paged: PagedPast | None,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Compute the same as ``naive.attend``.

    Raises:
        KernelError: ``unsupported`` has a reason against these inputs.
    """
    reason = unsupported(query, paged)
    if reason is not None:
        raise KernelError(f"the Triton attention cannot be used: {reason}; choose another backend")
    exact, (batch, _, _, head_dim) = exact.joined(), query.shape
    # Query heads that share a KV head become more query rows of it: [B, H, G * T, D].
    q = query.float().reshape(batch, exact.keys.shape[1], -1, head_dim).contiguous() * scaling
    out = torch.empty_like(q, dtype=query.dtype)
    half = query.dtype != torch.float32
    with torch.cuda.device_of(q):
        piece = attend_exactly(q, exact, precision_of(half), softcap)
        if sinks is not None:
            piece = with_sinks(piece, sinks)
        parts: list[SplitSums] = []
        if paged is not None and paged.tokens:
            parts = _paged_sums(Call(q, paged, _addresses(paged), half, softcap))
        merge(out, piece, parts)
    return out.view(query.shape)


def _addresses(paged: PagedPast) -> Tensor:
    """Return the addresses int64 ``[B, pages]`` of the pages; the same tensor again for the same past."""
    if _ADDRESSES not in paged.kept:
        paged.kept[_ADDRESSES] = page_addresses(paged.tiles)
    return paged.kept[_ADDRESSES]  # pyright: ignore[reportReturnType]


def _paged_sums(call: Call) -> list[SplitSums]:
    """Compute the softmax of the pages' tokens, span by span so that the scratch stays small."""
    scorer, values = Scorer(call), ValueSums(call)
    batch, heads, rows = call.q.shape[:3]
    span = max(1, _SCORES_AT_ONCE // (batch * heads * rows * values.split_tokens)) * values.split_tokens
    for start in range(0, call.paged.tokens, span):
        stop = min(start + span, call.paged.tokens)
        scores = torch.empty(batch, heads * rows, stop - start, device=call.q.device, dtype=torch.float32)
        scorer.write(scores, start, stop)
        values.add(scores, start, stop)
    return values.parts


class Piece(NamedTuple):
    """A part of a softmax: maximum of the scores and sum of weights ``[B, H, Q]``, weighted sum ``[B, H, Q, D]``."""

    maximum: Tensor
    mass: Tensor
    total: Tensor


def with_sinks(piece: Piece, sinks: Tensor) -> Piece:
    """The piece with one more score for each query head ``[Hq]``, that no value belongs to."""
    _, heads, rows = piece.maximum.shape
    own = sinks.float().repeat_interleave(heads * rows // len(sinks)).view(1, heads, rows)
    maximum = torch.maximum(piece.maximum, own)
    shrink = torch.exp(piece.maximum - maximum)
    return Piece(maximum, piece.mass * shrink + torch.exp(own - maximum), piece.total * shrink[..., None])


def attend_exactly(q: Tensor, exact: ExactPast, precision: str, softcap: float | None) -> Piece:
    """Attend to sinks, window and new tokens, unmerged; ``q`` is float32, scaled, ``[B, H, Q, D]``."""
    batch, heads, rows, head_dim = q.shape
    keys, values = (x if x.stride(3) == 1 else x.contiguous() for x in (exact.keys, exact.values))
    piece = Piece(q.new_empty(batch, heads, rows), q.new_empty(batch, heads, rows), torch.empty_like(q))
    query_tokens, mask_strides, mask = 1, (0, 0), q
    if exact.mask is not None:
        mask = exact.mask[:, 0]
        mask = mask if mask.stride(2) == 1 else mask.contiguous()
        query_tokens = mask.shape[1]
        mask_strides = (0 if mask.shape[0] == 1 else mask.stride(0), mask.stride(1))
    exact_piece[(heads, -(-rows // _ROWS), batch)](
        piece.maximum, piece.mass, piece.total, q, keys, values, mask,
        keys.stride(0), keys.stride(1), keys.stride(2), values.stride(0), values.stride(1), values.stride(2),
        mask_strides[0], mask_strides[1], keys.shape[2], rows, query_tokens, softcap or 0.0,
        HAS_CAP=softcap is not None, HAS_MASK=exact.mask is not None, PRECISION=precision, HEAD_DIM=head_dim,
        BLOCK_D=padded_columns(head_dim), BLOCK_N=_TILE_TOKENS, BLOCK_Q=_ROWS,
        num_warps=WARPS,  # pyright: ignore[reportCallIssue]
    )  # fmt: skip
    return piece


def merge(out: Tensor, exact: Piece, parts: list[SplitSums]) -> None:
    """Write the attention output ``[B, H, Q, D]``; ``parts`` together have every head, or there are none."""
    if not parts:
        mass = exact.mass[..., None]
        out.copy_(exact.total / torch.where(mass > 0.0, mass, 1.0))
        return
    batch, layer_heads, rows, head_dim = out.shape
    for bank, items, block_q, sums, stats, mean_sums, mean_maxima in parts:
        heads = bank.keep(("merge", rows, block_q), lambda b=bank, q=block_q: _merge_items(b, rows, q))
        decoder = bank.keep("value decoder", lambda b=bank: value_decoder(b, head_dim))
        splits, block = sums.shape[1], sums.shape[4]
        padded = min(_ROWS, 1 << (rows - 1).bit_length())
        columns = min(padded_columns(head_dim), block, max(8, _PRODUCTS // (padded * block)))
        merge_pieces[(len(heads), -(-rows // padded) * -(-head_dim // columns), batch)](
            out, sums, stats, *exact, heads, decoder.matrix, decoder.bias, decoder.places, decoder.latent_of,
            stats if mean_sums is None else mean_sums, stats if mean_maxima is None else mean_maxima, splits, len(items), rows, layer_heads, stats[0].numel(), CODED=bank.coded, HAS_MEANS=bank.has_means, ROUNDED=bank.rounded,
            EXACT=ELEMENT_TYPES[decoder.exact_dtype], HEAD_DIM=head_dim, ITEM_ROWS=block_q, BLOCK_R=block,
            SPLITS=max(1, _PRODUCTS // (padded * block)), ROWS=padded, COLUMNS=columns,
            num_warps=WARPS,  # pyright: ignore[reportCallIssue]
        )  # fmt: skip


def _merge_items(bank: Bank, rows: int, block_q: int) -> Tensor:
    """Make ``heads`` as ``merge_pieces`` takes them."""
    entries, item, first = [], 0, 0
    padded = bank.table.blocks * bank.table.block
    for index, group in enumerate(bank.groups):
        count, blocks = len(group.heads), bank.blocks(index)
        for place, head in enumerate(group.heads):
            # Every head has columns of its own in a matrix of floats; latents of slots are the same for all of a group.
            entries.append((head, item, blocks, place, first if bank.rounded else first + place * padded))
        first += padded if bank.rounded else count * padded
        item += -(-count * rows // block_q) * blocks
    return torch.tensor(entries, dtype=torch.int32, device=bank.device)
