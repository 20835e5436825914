"""Values summed as they are stored, split by split."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from .triton_groups import MOST_BLOCK_LATENTS, MOST_WORD_LATENTS, Bank, banks, whole_pages
from .triton_kernels import latent_sums
from .triton_merge import SplitSums
from .triton_scores import ELEMENT_TYPES, WARPS, Call, programs, query_block, tile_tokens, tiles_of_a_program

# Of a thread, so that two programs share a multiprocessor.
_REGISTERS = 128


class ValueSums:
    """Weighted sums of the stored values of all heads, taken span by span.

    A span holds whole splits, of ``split_tokens`` tokens each; every split has a softmax of its own.

    Attributes:
        parts: all splits of every bank, to be merged when all spans are in.
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
        self._tiles = tiles_of_a_program(programs(device), -(-call.table.places // tile), items)
        self.split_tokens = self._tiles * tile
        self._splits = -(-call.table.places // self.split_tokens)
        self.parts: list[SplitSums] = []
        for bank, items, block_q in parts:
            shape = (batch, self._splits, len(items), block_q)
            sums = torch.empty(*shape, bank.table.block, device=device)
            self.parts.append(SplitSums(bank, items, block_q, sums, torch.empty(2, *shape, device=device)))

    def add(self, scores: Tensor, start: int, stop: int) -> None:
        """Take in tokens ``start`` (the first of a split) to ``stop`` with scores ``[B, H * Q, stop - start]``."""
        call = self._call
        batch, heads, rows = call.q.shape[:3]
        for bank, items, block_q, sums, stats in self.parts:
            # Codes and 16-bit latents are exact in float16; lossless elements may not be.
            half = call.half and bank.coded
            planes, by_words = bank.planes(tile_tokens(call, keys=False), call.page_tokens)
            latent_sums[(-(-(stop - start) // self.split_tokens), len(items), batch)](
                sums, stats, scores, call.table.addresses, call.numbers, planes, bank.table.present, items, bank.heads,
                call.paged.first, call.table.last, start, stop, start // self.split_tokens, self._splits,
                call.table.addresses.shape[1], bank.table.latents, rows, heads,
                CHOSEN=call.chosen, PAGE_TOKENS=call.page_tokens, WORDS=by_words, WIDTHS=bank.table.widths, ELEMENT=ELEMENT_TYPES[bank.element],
                OPERAND=tl.float16 if half else tl.float32, PRECISION=call.precision, TILES=self._tiles,
                BLOCK_N=tile_tokens(call, keys=False), BLOCK_R=bank.table.block, BLOCK_Q=block_q,
                num_warps=WARPS,  # pyright: ignore[reportCallIssue]
                maxnreg=_REGISTERS if by_words else None,  # pyright: ignore[reportCallIssue]
            )  # fmt: skip


def _items(bank: Bank, rows: int) -> tuple[Tensor, int]:
    """Items of ``latent_sums`` for ``rows`` query rows of every head, and the rows of a program."""
    block_q = query_block(rows * max(len(group.heads) for group in bank.groups))
    items = []
    for index, group in enumerate(bank.groups):
        for row in range(0, len(group.heads) * rows, block_q):
            start, heads = index * bank.table.blocks, (bank.head_starts[index], len(group.heads))
            items += [(start + block, *heads, row) for block in range(bank.blocks(index))]
    return torch.tensor(items, dtype=torch.int32, device=bank.device), block_q
