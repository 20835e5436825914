"""Attention over pages, unmerged: launching the kernels for scores of packed keys and for sums of packed values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ...sizes import FINE_POSITIONS
from ..rotary import RotaryTable
from ..triton_unpack import HALF_SCALE
from .inputs import PagedPast
from .triton_kernels import decode_scores, direct_scores, latent_sums, mean_sums
from .triton_tables import (
    LONGEST_BLOCK,
    LONGEST_WORD_BLOCK,
    Bank,
    MeanTable,
    angle_tables,
    banks,
    key_decoder,
    padded_columns,
    split_pairs,
    turn_table,
    value_means,
    whole_pages,
)

ELEMENT_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
WARPS = 8
# Registers of a thread of the sums, so that two programs share a multiprocessor.
_REGISTERS = 128
PROGRAMS_PER_PROCESSOR = 2
_INTERPRETER_PROGRAMS = 8
_INTERPRETER_TILE_TOKENS = 256
# Columns of keys that half the warps have room for.
_COLUMNS_OF_FEW_WARPS = 128
# Blocks of a decoder's matrix that a program keeps in shared memory.
_KEPT_BLOCKS = 2


@dataclass(frozen=True)
class Call:
    """One attention call, as all launches see it.

    Attributes:
        q: queries float32 ``[B, H, Q, D]``, scaled; the query heads of a KV head are rows of it.
        paged: the past.
        addresses: of its pages, int64 ``[B, pages]``.
        half: 16-bit queries: matrix units may round operands to float16 or tf32.
        softcap: of the scores.
    """

    q: Tensor
    paged: PagedPast
    addresses: Tensor
    half: bool
    softcap: float | None

    @property
    def page_tokens(self) -> int:
        """Tokens of a page."""
        return self.paged.page_tokens

    @property
    def shown(self) -> Tensor:
        """Tokens of each page that are attended, int64 ``[B, pages]``; any tensor where they all are."""
        return self.paged.first if self.paged.shown is None else self.paged.shown

    @property
    def precision(self) -> str:
        """How float32 operands are multiplied; three tf32 products are as exact as float32."""
        return precision_of(self.half)


class Scorer:
    """Scores of any span of tokens; what does not depend on the span is computed once."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._banks = banks(call.paged.key_readers, call.q.device, LONGEST_BLOCK)
        self._folded = {bank: _fold(call, bank) for bank in self._banks if not _decodes(call, bank)}
        self._means: dict[Bank, Tensor] = {}
        rotary = call.paged.rotary
        self._turned = None
        if rotary is not None and len(self._folded) < len(self._banks):
            self._turned = _in_pairs(call.q, rotary)

    def write(self, scores: Tensor, start: int, stop: int) -> None:
        """Write scores float32 ``[B, H * Q, stop - start]`` of the tokens ``start`` to ``stop``."""
        for bank in self._banks:
            if bank in self._folded:
                self._direct(bank, scores, start, stop)
            else:
                self._decoded(bank, scores, start, stop)

    def _decoded(self, bank: Bank, scores: Tensor, start: int, stop: int) -> None:
        call, table, rotary = self._call, bank.table, self._call.paged.rotary
        assert rotary is not None
        batch, heads, rows, head_dim = call.q.shape
        half = call.half and bank.fits_float16
        decoder = key_decoder(bank, rotary, head_dim, torch.float16 if half else torch.float32)
        fine, coarse = angle_tables(rotary, call.paged.positions)
        block, block_rows = tile_tokens(call, keys=True), rows * decoder.heads_together
        planes, by_words = bank.planes(block, call.page_tokens)
        block_q = query_block(block_rows)
        turns = turn_table(rotary, float(HALF_SCALE.value) if by_words and half else 1.0)
        programs_here = -(-(stop - start) // block), len(decoder.items) * batch
        tiles = tiles_of_a_program(programs(call.q.device), *programs_here)
        decode_scores[(-(-(stop - start) // (block * tiles)), len(decoder.items), batch)](
            scores, call.addresses, planes, table.present, decoder.items, bank.heads, decoder.matrix, decoder.bias,
            decoder.exact, decoder.unit, self._turned, turns, fine, coarse, call.paged.first, call.paged.offset, call.shown,
            *_mean_tensors(decoder.means, decoder.items), start, stop,
            call.addresses.shape[1], table.latents, rows, heads, coarse.shape[1], call.softcap or 0.0,
            HAS_CAP=call.softcap is not None, HAS_SHOWN=call.paged.shown is not None, HAS_MEANS=decoder.means is not None,
            PAGE_TOKENS=call.page_tokens, WORDS=by_words, WIDTHS=table.widths, OPERAND=tl.float16 if half else tl.float32, SCORED=tl.float16 if half and bank.keys_fit_float16 else tl.float32,
            PRECISION=call.precision, PAIRS=rotary.width // 2, REST=head_dim - rotary.width, FINE=FINE_POSITIONS, TILES=tiles,
            ROUNDED=bank.rounded, EXACT_BLOCKS=decoder.exact_blocks,
            KEEP=half and table.blocks <= _KEPT_BLOCKS, BLOCKS=table.blocks, ROW_BLOCKS=-(-block_rows // block_q),
            BLOCK_N=block, BLOCK_R=table.block, BLOCK_Q=block_q, BLOCK_PAIRS=decoder.block_pairs,
            BLOCK_REST=decoder.block_rest,
            num_warps=WARPS // 2 if by_words and decoder.matrix.shape[1] <= _COLUMNS_OF_FEW_WARPS else WARPS,  # pyright: ignore[reportCallIssue]
            num_stages=1 if half else 2,  # pyright: ignore[reportCallIssue]
        )  # fmt: skip

    def _direct(self, bank: Bank, scores: Tensor, start: int, stop: int) -> None:
        call, table = self._call, bank.table
        batch, heads, rows = call.q.shape[:3]
        operand, constant, items, block_q = self._folded[bank]
        block = tile_tokens(call, keys=False)
        planes, by_words = bank.planes(block, call.page_tokens)
        direct_scores[(-(-(stop - start) // block), len(items), batch)](
            scores, call.addresses, planes, table.present, items, bank.heads, operand, constant, self._of_means(bank), call.paged.first, call.shown,
            start, stop, call.addresses.shape[1], table.latents, rows, heads, operand.shape[1], call.softcap or 0.0,
            HAS_CAP=call.softcap is not None, HAS_SHOWN=call.paged.shown is not None, HAS_MEANS=bank.has_means, PAGE_TOKENS=call.page_tokens, WORDS=by_words,
            WIDTHS=table.widths, ELEMENT=ELEMENT_TYPES[bank.element], PRECISION=call.precision, BLOCKS=table.blocks, BLOCK_N=block, BLOCK_R=table.block,
            BLOCK_Q=block_q, num_warps=WARPS,  # pyright: ignore[reportCallIssue]
        )  # fmt: skip

    def _of_means(self, bank: Bank) -> Tensor:
        """What the mean error of every page adds to scores of keys that do not turn, ``[B, H * Q, pages]``; any tensor without."""
        call = self._call
        if not bank.has_means:
            return call.q
        if bank not in self._means:
            scores = call.q.new_zeros(*call.q.shape[:3], call.addresses.shape[1])
            for group in bank.groups:
                if group.means is not None:
                    means = group.means.of(call.paged.tiles).unflatten(-1, (len(group.heads), -1)).permute(0, 2, 3, 1)
                    index = bank.index(group)
                    scores.index_copy_(1, index, call.q.index_select(1, index) @ means)
            self._means[bank] = scores
        return self._means[bank]


class SplitSums(NamedTuple):
    """Sums of a bank's stored values, as ``latent_sums`` writes them.

    Attributes:
        bank: whose latents.
        items: int32 ``[I, 4]``, as ``latent_sums`` takes them.
        block_q: query rows of an item.
        sums: float32 ``[B, splits, items, block_q, block]``.
        stats: float32 ``[2, B, splits, items, block_q]``, maxima and masses.
        mean_sums, mean_maxima: of the pages' mean errors, as the kernel ``mean_sums`` writes them; None where there are none.
    """

    bank: Bank
    items: Tensor
    block_q: int
    sums: Tensor
    stats: Tensor
    mean_sums: Tensor | None = None
    mean_maxima: Tensor | None = None


class ValueSums:
    """Weighted sums of the stored values of all heads, taken span by span.

    A span has whole splits, of ``split_tokens`` tokens each; every split has a softmax of its own.

    Attributes:
        parts: all splits of every bank, to be merged when all spans are in.
    """

    def __init__(self, call: Call) -> None:
        self._call = call
        batch, _, rows, _ = call.q.shape
        device = call.q.device
        tile = tile_tokens(call, keys=False)
        longest = LONGEST_WORD_BLOCK if whole_pages(tile, call.page_tokens) else LONGEST_BLOCK
        parts = [
            (bank, *bank.keep(("sums", rows), lambda bank=bank: _sum_items(bank, rows)))
            for bank in banks(call.paged.value_readers, device, longest)
        ]
        items = batch * sum(len(items) for _, items, _ in parts)
        self._tiles = tiles_of_a_program(programs(device), -(-call.paged.tokens // tile), items)
        self.split_tokens = self._tiles * tile
        self._splits = -(-call.paged.tokens // self.split_tokens)
        self.parts: list[SplitSums] = []
        for bank, items, block_q in parts:
            shape = (batch, self._splits, len(items), block_q)
            sums = torch.empty(*shape, bank.table.block, device=device, dtype=torch.float32)
            own = SplitSums(bank, items, block_q, sums, torch.empty(2, *shape, device=device, dtype=torch.float32))
            if bank.has_means:
                shape = (batch, self._splits, *call.q.shape[1:3])
                own = own._replace(
                    mean_sums=torch.empty(*shape, call.q.shape[3], device=device, dtype=torch.float32),
                    mean_maxima=torch.empty(shape, device=device, dtype=torch.float32),
                )
            self.parts.append(own)

    def add(self, scores: Tensor, start: int, stop: int) -> None:
        """Take in tokens ``start`` (the first of a split) to ``stop`` with scores ``[B, H * Q, stop - start]``."""
        call = self._call
        batch, heads, rows = call.q.shape[:3]
        for part in self.parts:
            bank, items, block_q, sums, stats, *_ = part
            # Codes and 16-bit latents are exact in float16; lossless elements may not be.
            half = call.half and bank.coded
            planes, by_words = bank.planes(tile_tokens(call, keys=False), call.page_tokens)
            latent_sums[(-(-(stop - start) // self.split_tokens), len(items), batch)](
                sums, stats, scores, call.addresses, planes, bank.table.present, items, bank.heads,
                call.paged.first, start, stop, start // self.split_tokens, self._splits,
                call.addresses.shape[1], bank.table.latents, rows, heads,
                PAGE_TOKENS=call.page_tokens, WORDS=by_words, WIDTHS=bank.table.widths, ELEMENT=ELEMENT_TYPES[bank.element],
                OPERAND=tl.float16 if half else tl.float32, PRECISION=call.precision, TILES=self._tiles,
                BLOCK_N=tile_tokens(call, keys=False), BLOCK_R=bank.table.block, BLOCK_Q=block_q,
                num_warps=WARPS,  # pyright: ignore[reportCallIssue]
                maxnreg=_REGISTERS if by_words else None,  # pyright: ignore[reportCallIssue]
            )  # fmt: skip
            if part.mean_sums is not None and part.mean_maxima is not None:
                self._add_means(bank, part.mean_sums, part.mean_maxima, scores, start, stop)

    def _add_means(self, bank: Bank, sums: Tensor, maxima: Tensor, scores: Tensor, start: int, stop: int) -> None:
        """Take in the mean errors of the same pages."""
        call = self._call
        batch, _, rows, head_dim = call.q.shape
        means = bank.keep("value means", lambda: value_means(bank, head_dim))
        # All tokens of a tile are of one page, as those of keys.
        tile, block_q, count = gpu_tile_tokens(call, keys=True), query_block(rows), len(bank.heads)
        grid = (-(-(stop - start) // self.split_tokens), count * -(-rows // block_q), batch)
        mean_sums[grid](
            sums, maxima, scores, call.addresses, bank.heads, means.offset, means.place, means.scale, start, stop,
            start // self.split_tokens, self._splits, call.addresses.shape[1], count, rows, call.q.shape[1],
            PAGE_TOKENS=call.page_tokens, HEAD_DIM=head_dim, BLOCK_D=padded_columns(head_dim),
            TILES=self.split_tokens // tile, BLOCK_N=tile, BLOCK_Q=block_q,
            num_warps=WARPS // 2,  # pyright: ignore[reportCallIssue]
        )  # fmt: skip


def _mean_tensors(means: MeanTable | None, nothing: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A table as kernels take it, or what they do not read."""
    return (nothing, nothing, nothing) if means is None else (means.offset, means.place, means.scale)


def _in_pairs(q: Tensor, rotary: RotaryTable) -> Tensor:
    """Order the elements of queries ``[..., D]`` as ``split_pairs`` does, scaled as the model scales angles."""
    scale = rotary.attention_scale
    if rotary.style == "half" and scale == 1.0:
        return q
    first, second, rest = split_pairs(q, rotary)
    return torch.cat([first * scale, second * scale, rest], dim=-1)


def precision_of(half: bool) -> str:
    """Name the precision of products; see ``Call.precision``."""
    return "tf32" if half else "tf32x3"


def tile_tokens(call: Call, keys: bool) -> int:
    """Choose the tokens of a tile: many where programs run in turn."""
    return gpu_tile_tokens(call, keys) if call.q.device.type == "cuda" or keys else _INTERPRETER_TILE_TOKENS


def gpu_tile_tokens(call: Call, keys: bool) -> int:
    """Choose the tokens of a tile on a GPU: 64 of decoded keys, all of one page, or float32 operands."""
    return min(64, call.page_tokens & -call.page_tokens) if keys else 128 if call.half else 64


def tiles_of_a_program(programs: int, tiles: int, items: int) -> int:
    """Choose how many tiles a program takes in turn: a power of two, as each is compiled, that fills the machine."""
    return 1 << (-(-tiles // max(1, programs // items)) - 1).bit_length()


def programs(device: torch.device) -> int:
    """Count the programs that fill the machine."""
    if device.type != "cuda":
        return _INTERPRETER_PROGRAMS
    return torch.cuda.get_device_properties(device).multi_processor_count * PROGRAMS_PER_PROCESSOR


def query_block(rows: int) -> int:
    """Choose the query rows of a program: a power of two from 4 to 64; matrix units take them as columns of 8."""
    return max(4, min(64, 1 << (rows - 1).bit_length()))


def _largest_group(bank: Bank) -> int:
    return max(len(group.heads) for group in bank.groups)


def _decodes(call: Call, bank: Bank) -> bool:
    """Whether keys must exist to be rotated; otherwise the query goes to where the stored values are."""
    return bank.coded and call.paged.rotary is not None


def _fold(call: Call, bank: Bank) -> tuple[Tensor, Tensor, Tensor, int]:
    """Make operand, constant, items and block of query rows of ``direct_scores``."""
    batch, heads, rows = call.q.shape[:3]
    constant = torch.zeros(batch, heads, rows, device=call.q.device, dtype=torch.float32)
    parts = []
    for group in bank.groups:
        own = call.q.index_select(1, bank.index(group))
        if bank.coded:
            affine = bank.keep(("folded", group), group.matrix_and_bias)
            matrix, bias = (x.unflatten(-1, (len(group.heads), -1)) for x in affine)
            constant.index_copy_(1, bank.index(group), (own @ bias[..., None])[..., 0])
            own = own @ matrix.permute(1, 2, 0)
        width = bank.table.blocks * bank.table.block
        parts.append(torch.nn.functional.pad(own, (0, width - own.shape[-1])).flatten(1))
    items, block_q = bank.keep(("folded", rows), lambda: _fold_items(bank, rows))
    return torch.cat(parts, dim=1), constant, items, block_q


def _fold_items(bank: Bank, rows: int) -> tuple[Tensor, int]:
    block_q = query_block(rows * _largest_group(bank))
    items, place = [], 0
    for index, group in enumerate(bank.groups):
        own, count = len(group.heads) * rows, len(group.heads)
        block, start = index * bank.table.blocks, bank.head_starts[index]
        items += [(block, start, count, row, place) for row in range(0, own, block_q)]
        place += own * bank.table.blocks * bank.table.block
    return torch.tensor(items, dtype=torch.int32, device=bank.device), block_q


def _sum_items(bank: Bank, rows: int) -> tuple[Tensor, int]:
    """List the items of ``latent_sums`` for ``rows`` query rows of every head, and the rows of a program."""
    block_q = query_block(rows * _largest_group(bank))
    items = []
    for index, group in enumerate(bank.groups):
        for row in range(0, len(group.heads) * rows, block_q):
            start, heads = index * bank.table.blocks, (bank.head_starts[index], len(group.heads))
            items += [(start + block, *heads, row) for block in range(bank.blocks(index))]
    return torch.tensor(items, dtype=torch.int32, device=bank.device), block_q
