"""Launching the kernels at both ends of a step: what is held exactly, and all pieces put together."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .inputs import ExactPast
from .triton_groups import Bank, padded_columns
from .triton_merge_kernels import exact_piece, merge_pieces

_WARPS = 8
_TILE_TOKENS = 32
_ROWS = 16
# Elements of the products that a program of the merge holds.
_PRODUCTS = 8192


class Piece(NamedTuple):
    """A part of a softmax: maximum of the scores and sum of weights ``[B, H, Q]``, weighted sum ``[B, H, Q, D]``."""

    most: Tensor
    mass: Tensor
    total: Tensor


class SplitSums(NamedTuple):
    """What ``latent_sums`` wrote for a bank.

    Attributes:
        bank: whose latents.
        items: int32 ``[I, 4]``, as ``latent_sums`` takes them.
        block_q: query rows of an item.
        sums: float32 ``[B, splits, items, block_q, block]``.
        stats: float32 ``[2, B, splits, items, block_q]``.
    """

    bank: Bank
    items: Tensor
    block_q: int
    sums: Tensor
    stats: Tensor


def attend_exactly(q: Tensor, exact: ExactPast, precision: str, softcap: float | None) -> Piece:
    """Sinks, window and new tokens as a piece; ``q`` is float32, scaled, ``[B, H, Q, D]``."""
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
        piece.most, piece.mass, piece.total, q, keys, values, mask,
        keys.stride(0), keys.stride(1), keys.stride(2), values.stride(0), values.stride(1), values.stride(2),
        mask_strides[0], mask_strides[1], keys.shape[2], rows, query_tokens, softcap or 0.0,
        HAS_CAP=softcap is not None, HAS_MASK=exact.mask is not None, PRECISION=precision, HEAD_DIM=head_dim,
        BLOCK_D=padded_columns(head_dim), BLOCK_N=_TILE_TOKENS, BLOCK_Q=_ROWS,
        num_warps=_WARPS,  # pyright: ignore[reportCallIssue]
    )  # fmt: skip
    return piece


def merge(out: Tensor, exact: Piece, parts: list[SplitSums]) -> None:
    """Write the attention output ``[B, H, Q, D]``; ``parts`` together have every head, or there are none."""
    if not parts:
        mass = exact.mass[..., None]
        out.copy_(exact.total / torch.where(mass > 0.0, mass, 1.0))
        return
    batch, layer_heads, rows, head_dim = out.shape
    for bank, items, block_q, sums, stats in parts:
        heads, matrix, bias = bank.keep(
            ("merge", rows, block_q), lambda b=bank, q=block_q: _tables(b, rows, q, head_dim)
        )
        splits, block = sums.shape[1], sums.shape[4]
        padded = min(_ROWS, 1 << (rows - 1).bit_length())
        columns = min(padded_columns(head_dim), block, max(8, _PRODUCTS // (padded * block)))
        merge_pieces[(len(heads), -(-rows // padded) * -(-head_dim // columns), batch)](
            out, sums, stats, *exact, heads, matrix, bias, splits, len(items), rows, layer_heads, stats[0].numel(),
            CODED=bank.coded, HEAD_DIM=head_dim, ITEM_ROWS=block_q, BLOCK_R=block,
            SPLITS=max(1, _PRODUCTS // (padded * block)), ROWS=padded, COLUMNS=columns,
            num_warps=_WARPS,  # pyright: ignore[reportCallIssue]
        )  # fmt: skip


def _tables(bank: Bank, rows: int, block_q: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Heads, matrices and biases as ``merge_pieces`` takes them."""
    entries, matrices, biases, item, row = [], [], [], 0, 0
    padded = bank.table.blocks * bank.table.block
    for index, group in enumerate(bank.groups):
        count, blocks = len(group.heads), bank.blocks(index)
        for place, head in enumerate(group.heads):
            entries.append((head, item, blocks, place, row))
            if group.affine is not None:
                own = slice(place * head_dim, (place + 1) * head_dim)
                matrix, bias = group.affine[0][:, own].float(), group.affine[1][own].float()
                matrices.append(torch.nn.functional.pad(matrix, (0, 0, 0, padded - len(matrix))))
                biases.append(bias)
                row += padded
        item += -(-count * rows // block_q) * blocks
    heads = torch.tensor(entries, dtype=torch.int32, device=bank.device)
    if not bank.coded:
        nothing = torch.empty(0, dtype=torch.float32, device=bank.device)
        return heads, nothing, nothing
    return heads, torch.cat(matrices), torch.stack(biases)
