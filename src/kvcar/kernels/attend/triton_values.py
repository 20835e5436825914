"""Values summed as they are stored, and the merging of all pieces of a softmax."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from .inputs import ExactPast
from .triton_groups import MOST_BLOCK_LATENTS, MOST_WORD_LATENTS, Bank, banks, whole_pages
from .triton_kernels import latent_sums
from .triton_scores import ELEMENT_TYPES, WARPS, Call, programs, query_block, tile_tokens, tiles_of_a_program

# Of a thread, so that two programs share a multiprocessor.
_REGISTERS = 128


class Piece(NamedTuple):
    """A part of a softmax: maximum of the scores and sum of weights ``[B, H, Q]``, weighted sum ``[B, H, Q, D]``."""

    most: Tensor
    mass: Tensor
    total: Tensor


class _Launch(NamedTuple):
    bank: Bank
    items: Tensor
    block_q: int
    sums: Tensor
    stats: Tensor


class ValueSums:
    """Weighted sums of the stored values of all heads, taken span by span.

    A span holds whole splits, of ``split_tokens`` tokens each; every split has a softmax of its own.
    """

    def __init__(self, call: Call) -> None:
        self._call = call
        batch, _, rows, _ = call.q.shape
        device = call.q.device
        tile = tile_tokens(call, keys=False)
        most = MOST_WORD_LATENTS if whole_pages(tile, call.page_tokens) else MOST_BLOCK_LATENTS
        parts = [
            (bank, *bank.keep(("sums", rows), lambda bank=bank: _items(bank, rows)))
            for bank in banks(call.paged.value_readers, device, most)
        ]
        items = batch * sum(len(items) for _, items, _ in parts)
        self._tiles = tiles_of_a_program(programs(device), -(-call.paged.tokens // tile), items)
        self.split_tokens = self._tiles * tile
        self._splits = -(-call.paged.tokens // self.split_tokens)
        self._launches: list[_Launch] = []
        for bank, items, block_q in parts:
            shape = (batch, self._splits, len(items), block_q)
            sums = torch.empty(*shape, bank.table.block, device=device)
            self._launches.append(_Launch(bank, items, block_q, sums, torch.empty(2, *shape, device=device)))

    def add(self, scores: Tensor, start: int, stop: int) -> None:
        """Take in tokens ``start`` (the first of a split) to ``stop`` with scores ``[B, H * Q, stop - start]``."""
        call = self._call
        batch, heads, rows = call.q.shape[:3]
        for bank, items, block_q, sums, stats in self._launches:
            # Codes and 16-bit latents are exact in float16; lossless elements may not be.
            half = call.half and bank.coded
            planes, by_words = bank.planes(tile_tokens(call, keys=False), call.page_tokens)
            latent_sums[(-(-(stop - start) // self.split_tokens), len(items), batch)](
                sums, stats, scores, call.pages, planes, bank.table.present, items, bank.heads,
                call.paged.first, start, stop, start // self.split_tokens, self._splits,
                call.pages.shape[1], bank.table.latents, rows, heads,
                PAGE_TOKENS=call.page_tokens, WORDS=by_words, WIDTHS=bank.table.widths, ELEMENT=ELEMENT_TYPES[bank.element],
                OPERAND=tl.float16 if half else tl.float32, PRECISION=call.precision, TILES=self._tiles,
                BLOCK_N=tile_tokens(call, keys=False), BLOCK_R=bank.table.block, BLOCK_Q=block_q,
                num_warps=WARPS,  # pyright: ignore[reportCallIssue]
                maxnreg=_REGISTERS if by_words else None,  # pyright: ignore[reportCallIssue]
            )  # fmt: skip

    def piece(self) -> Piece:
        """All pages as one piece: splits merged, then the sums decoded once for every query row."""
        q = self._call.q
        out = Piece(torch.zeros_like(q[..., 0]), torch.zeros_like(q[..., 0]), torch.zeros_like(q))
        for bank, _, block_q, sums, stats in self._launches:
            item = 0
            for index, group in enumerate(bank.groups):
                rows, blocks = len(group.heads) * q.shape[2], bank.blocks(index)
                count = -(-rows // block_q) * blocks
                own = slice(item, item + count)
                most, mass, latents = _merge_splits(sums[:, :, own], stats[:, :, :, own], blocks, rows)
                shape = (q.shape[0], len(group.heads), q.shape[2])
                latents = latents[..., : group.latents].view(*shape, -1)
                heads = list(group.heads)
                out.most[:, heads], out.mass[:, heads] = most.view(shape), mass.view(shape)
                out.total[:, heads] = _decoded(latents, mass.view(*shape, 1), group.affine)
                item += count
        return out


def exact_piece(q: Tensor, exact: ExactPast, softcap: float | None) -> Piece:
    """Sinks, window and new tokens as a piece; ``q`` is scaled, ``[B, H, Q, D]``."""
    scores = q @ exact.keys.float().transpose(2, 3)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if exact.mask is not None:
        groups = q.shape[2] // exact.mask.shape[2]
        # [B, 1, T, S] -> [B, 1, Q, S]; one query token needs no copy.
        mask = exact.mask if exact.mask.shape[2] == 1 else exact.mask.repeat(1, 1, groups, 1)
        scores = scores.masked_fill(~mask, -torch.inf)
    most = scores.amax(-1)
    weights = torch.exp(scores - _anchor(most)[..., None])
    return Piece(most, weights.sum(-1), weights @ exact.values.float())


def merged(pieces: list[Piece]) -> Tensor:
    """Normalised output ``[B, H, Q, D]``; rows that saw nothing are 0."""
    anchor = _anchor(torch.stack([piece.most for piece in pieces]).amax(0))
    total = torch.zeros_like(pieces[0].total)
    mass = torch.zeros_like(anchor)
    for piece in pieces:
        weight = torch.exp(piece.most - anchor)
        mass += piece.mass * weight
        total += piece.total * weight[..., None]
    return total / mass.clamp_min(torch.finfo(torch.float32).tiny)[..., None]


def _merge_splits(sums: Tensor, stats: Tensor, blocks: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Maximum and mass ``[B, rows]`` and latents ``[B, rows, blocks * block]`` of a group.

    Items of a group run over blocks of rows, and within over blocks of latents: sums are
    ``[B, splits, items, block_q, block]``, stats ``[2, B, splits, items, block_q]``.
    """
    batch, splits, items, block_q, block = sums.shape
    by_row = stats[:, :, :, ::blocks].flatten(3)[..., :rows]
    most = by_row[0].amax(1)
    weight = torch.exp(by_row[0] - _anchor(most)[:, None])
    whole = sums.view(batch, splits, items // blocks, blocks, block_q, block).transpose(3, 4)
    whole = whole.reshape(batch, splits, -1, blocks * block)[:, :, :rows]
    return most, (weight * by_row[1]).sum(1), (weight[..., None] * whole).sum(1)


def _decoded(latents: Tensor, mass: Tensor, affine: tuple[Tensor, Tensor] | None) -> Tensor:
    """Sums of values ``[B, h, Q, D]`` of sums of stored values ``[B, h, Q, R]`` and of weights ``[B, h, Q, 1]``."""
    if affine is None:
        return latents
    matrix, bias = (x.unflatten(-1, (latents.shape[1], -1)) for x in affine)
    return latents @ matrix.transpose(0, 1) + mass * bias[:, None]


def _anchor(most: Tensor) -> Tensor:
    """What to subtract from scores: their maximum, or 0 where there is none."""
    return most.masked_fill(most == -torch.inf, 0.0)


def _items(bank: Bank, rows: int) -> tuple[Tensor, int]:
    """Items of ``latent_sums`` for ``rows`` query rows of every head, and the rows of a program."""
    block_q = query_block(rows * max(len(group.heads) for group in bank.groups))
    items = []
    for index, group in enumerate(bank.groups):
        for row in range(0, len(group.heads) * rows, block_q):
            start, heads = index * bank.table.blocks, (bank.head_starts[index], len(group.heads))
            items += [(start + block, *heads, row) for block in range(bank.blocks(index))]
    return torch.tensor(items, dtype=torch.int32, device=bank.device), block_q
