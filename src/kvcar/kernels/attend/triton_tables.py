"""Tables that the Triton kernels read, made once and kept: a layer's readers in banks, where its pages lie, angles."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import TypeVar

import torch
from torch import Tensor

from ...layout import SEGMENT_ALIGNMENT_BYTES, SegmentLayout
from ...sizes import rotary_table_entries
from ..plane_table import (
    PlaneTable,
    block_latents,
    has_elements,
    highest_codes,
    joined,
    segment_fields,
    spread,
    word_fields,
    word_slots,
)
from ..rotary import RotaryTable
from .inputs import Reader

# Latents of a block. A page of 64 tokens and 64 latents is a word and eight tokens for each of 128 threads; every block
# of values reads the scores anew, so they come in larger ones, where they are unpacked by words and leave the
# registers.
LONGEST_BLOCK = 64
LONGEST_WORD_BLOCK = 128
# Columns of keys that a program of the decoding kernel has as float32, at most.
_COLUMNS = 128
_HEADS_TOGETHER = 4
# Beyond these float16 would round a decoder's matrix worse than bfloat16 rounds keys.
_FLOAT16_SMALLEST, _FLOAT16_LARGEST = 2.0**-10, 2.0**15
# Turned, an element of a key is at most the square root of 2 as large.
_FLOAT16_LARGEST_KEY = 65504 / 2**0.5

_Made = TypeVar("_Made")
_Place = tuple[int, tuple[int, ...], tuple[int, ...]]


def whole_pages(tile: int, page_tokens: int) -> bool:
    """Whether tiles of so many tokens are of whole pages, as those unpacked by words are."""
    return tile % page_tokens == 0


@dataclass(frozen=True, eq=False)
class Group:
    """KV heads that are read through the same latents.

    Attributes:
        heads: heads of the layer.
        fields: of their latents, as in ``PlaneTable``.
        affine: matrix ``[R, len(heads) * D]`` and bias of the decoder; None when the latents are the one head itself.
    """

    heads: tuple[int, ...]
    fields: Tensor
    affine: tuple[Tensor, Tensor] | None

    @property
    def latents(self) -> int:
        """Latents read."""
        return self.fields.shape[-1]


@dataclass(frozen=True, eq=False)
class Bank:
    """Groups that one launch computes.

    Attributes:
        groups: coded ones, or lossless ones.
        element: dtype of elements stored as they are.
        longest_block: most latents of a block, where none is stored as it is.
        device: where the tables lie.
        made: what callers keep with it, by what it depends on.
    """

    groups: tuple[Group, ...]
    element: torch.dtype
    longest_block: int
    device: torch.device
    made: dict[object, object] = field(default_factory=dict)

    @property
    def coded(self) -> bool:
        """Whether the groups have decoders."""
        return self.groups[0].affine is not None

    @cached_property
    def table(self) -> PlaneTable:
        """Planes of all groups."""
        fields = [group.fields for group in self.groups]
        longest = LONGEST_BLOCK if any(has_elements(each) for each in fields) else self.longest_block
        return joined(fields, block_latents([group.latents for group in self.groups], longest), self.device)

    @cached_property
    def words(self) -> Tensor:
        """The same planes by words of four latents."""
        return word_fields(self.table.fields.cpu()).to(self.device)

    @cached_property
    def with_elements(self) -> bool:
        """Whether any latent is stored as it is."""
        return has_elements(self.table.fields)

    def planes(self, tile: int, page_tokens: int) -> tuple[Tensor, bool]:
        """Table for tiles of so many tokens, and whether it is that of words."""
        by_words = whole_pages(tile, page_tokens) and not self.with_elements
        return (self.words if by_words else self.table.fields), by_words

    @cached_property
    def heads(self) -> Tensor:
        """Heads of all groups, int32."""
        heads = [head for group in self.groups for head in group.heads]
        return torch.tensor(heads, dtype=torch.int32, device=self.device)

    @cached_property
    def fits_float16(self) -> bool:
        """Whether the decoders' matrices are as exact as needed in float16 (codes always are)."""
        largest = [float(group.affine[0].abs().max()) for group in self.groups if group.affine is not None]
        return all(_FLOAT16_SMALLEST < value < _FLOAT16_LARGEST for value in largest)

    @cached_property
    def keys_fit_float16(self) -> bool:
        """Whether decoded keys lie within float16's range, whatever their codes and angles."""
        return not self.with_elements and all(
            float((highest_codes(group.fields).to(self.device) @ matrix.abs() + bias.abs()).max())
            < _FLOAT16_LARGEST_KEY
            for group in self.groups
            if group.affine is not None
            for matrix, bias in [group.affine]
        )

    @property
    def head_starts(self) -> list[int]:
        """Place in ``heads`` of every group's first."""
        counts = [len(group.heads) for group in self.groups]
        return [sum(counts[:index]) for index in range(len(counts))]

    def blocks(self, group: int) -> int:
        """Blocks of latents that a group fills; the table has ``table.blocks`` for every group."""
        return -(-self.groups[group].latents // self.table.block)

    def index(self, group: Group) -> Tensor:
        """Its heads, int64: made once, as a list would be sent to the device, and waited for, at every step."""
        return self.keep(("index", group), lambda: torch.tensor(group.heads, device=self.device))

    def keep(self, key: object, make: Callable[[], _Made]) -> _Made:
        """What ``make`` gave for this key the first time."""
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]  # pyright: ignore[reportReturnType]


@dataclass(frozen=True, eq=False)
class KeyDecoder:
    """Decoders of a bank's keys, their columns in the order of the decoding kernel.

    Attributes:
        items, matrix, bias: as ``decode_scores`` takes them.
        heads_together: heads of the item that has most.
        block_pairs, block_rest: columns, padded, of the pairs' elements and of the rest.
    """

    items: Tensor
    matrix: Tensor
    bias: Tensor
    heads_together: int
    block_pairs: int
    block_rest: int


_ANGLES: weakref.WeakKeyDictionary[RotaryTable, tuple[Tensor, Tensor]] = weakref.WeakKeyDictionary()
_TURNS: weakref.WeakKeyDictionary[RotaryTable, dict[float, Tensor]] = weakref.WeakKeyDictionary()
_BANKS: weakref.WeakKeyDictionary[Reader, dict[tuple[int | weakref.ref[Reader], ...], tuple[Bank, ...]]] = (
    weakref.WeakKeyDictionary()
)


def banks(readers: tuple[Reader, ...], device: torch.device, longest_block: int) -> tuple[Bank, ...]:
    """Sort ``readers`` into banks that together give all heads: one of the coded groups, one of the lossless ones."""
    kept = _BANKS.setdefault(readers[0], {})
    key = longest_block, *(weakref.ref(reader) for reader in readers)
    if key not in kept:
        coded = tuple(_coded_group(reader) for reader in readers if not reader.segment.lossless)
        lossless = tuple(g for reader in readers if reader.segment.lossless for g in _lossless_groups(reader))
        exact = next((reader.exact_dtype for reader in readers if reader.segment.lossless), torch.float16)
        pairs = [(coded, torch.float16), (lossless, exact)]
        kept[key] = tuple(Bank(groups, element, longest_block, device) for groups, element in pairs if groups)
    return kept[key]


def _coded_group(reader: Reader) -> Group:
    """Latents in slots; those that are none have no bits and rows of 0 in the decoder's matrix."""
    affine = reader.matrix_and_bias()
    slots = word_slots(reader.segment)
    fields = spread(segment_fields(reader.segment), slots)
    matrix = affine[0].new_zeros(fields.shape[-1], affine[0].shape[1])
    matrix[slots.to(matrix.device)] = affine[0]
    return Group(reader.heads, fields, (matrix, affine[1]))


def _lossless_groups(reader: Reader) -> list[Group]:
    fields = segment_fields(reader.segment, reader.exact_dtype.itemsize)
    columns = _selected(reader.decode, reader.segment).view(len(reader.heads), -1)
    return [Group((head,), fields[..., own], None) for head, own in zip(reader.heads, columns, strict=True)]


def _selected(decode: Callable[[Tensor], Tensor], segment: SegmentLayout) -> Tensor:
    """Which elements the decoder of a lossless segment selects: what it makes of 0, 1, 2, ..."""
    return decode(torch.arange(segment.latents, dtype=torch.float32)[None])[0].long()


def key_decoder(bank: Bank, rotary: RotaryTable, head_dim: int, dtype: torch.dtype) -> KeyDecoder:
    """Decoders of a coded bank for keys that ``rotary`` rotates, matrices in ``dtype``."""
    key = ("keys", rotary.style, rotary.width, dtype)
    return bank.keep(key, lambda: _make_key_decoder(bank, rotary, head_dim, dtype))


def _make_key_decoder(bank: Bank, rotary: RotaryTable, head_dim: int, dtype: torch.dtype) -> KeyDecoder:
    largest = max(len(group.heads) for group in bank.groups)
    together = max(1, min(largest, _HEADS_TOGETHER, _COLUMNS // head_dim))
    pairs, rest = rotary.width // 2, head_dim - rotary.width
    block_pairs, block_rest = padded_columns(together * pairs), padded_columns(together * rest) if rest else 0
    blocks = bank.table.blocks
    items, matrices, biases, rows = [], [], [], 0
    for index, group in enumerate(bank.groups):
        assert group.affine is not None
        start = bank.head_starts[index]
        for first in range(0, len(group.heads), together):
            count = min(together, len(group.heads) - first)
            wanted = slice(first * head_dim, (first + count) * head_dim)
            items.append((index * blocks, start + first, count, rows))
            matrix = _columns(group.affine[0][:, wanted], count, rotary, block_pairs, block_rest)
            matrices.append(torch.nn.functional.pad(matrix, (0, 0, 0, blocks * bank.table.block - len(matrix))))
            biases.append(_columns(group.affine[1][None, wanted], count, rotary, block_pairs, block_rest))
            rows += blocks
    table = torch.tensor(items, dtype=torch.int32, device=bank.device)
    return KeyDecoder(table, torch.cat(matrices).to(dtype), torch.cat(biases), together, block_pairs, block_rest)


def _columns(matrix: Tensor, heads: int, rotary: RotaryTable, block_pairs: int, block_rest: int) -> Tensor:
    """Columns ``[R, 2 * block_pairs + block_rest]`` of ``[R, heads * D]``.

    8 first elements of pairs, their 8 second ones, and so on, then what is not rotated.
    """
    parts = (part.flatten(1) for part in split_pairs(matrix.unflatten(-1, (heads, -1)), rotary))
    sizes = (block_pairs, block_pairs, block_rest)
    first, second, rest = (torch.nn.functional.pad(x, (0, n - x.shape[1])) for x, n in zip(parts, sizes, strict=True))
    pairs = torch.stack([first.unflatten(1, (-1, 8)), second.unflatten(1, (-1, 8))], dim=2).flatten(1)
    return torch.cat([pairs, rest], dim=1)


def split_pairs(x: Tensor, rotary: RotaryTable) -> tuple[Tensor, Tensor, Tensor]:
    """First and second elements ``[..., F]`` of a head's rotated pairs, and what is not rotated."""
    width = rotary.width
    if rotary.style == "half":
        return x[..., : width // 2], x[..., width // 2 : width], x[..., width:]
    return x[..., 0:width:2], x[..., 1:width:2], x[..., width:]


def padded_columns(columns: int) -> int:
    """A power of two of at least 16, as matrix units want it."""
    return max(16, 1 << (columns - 1).bit_length())


def page_addresses(tiles: Sequence[Tensor]) -> Tensor:
    """List the addresses int64 ``[B, pages]`` of all pages; the arenas stay where they are."""
    return _addresses(tuple(_place(tile) for tile in tiles), tiles[0].device)


def are_aligned(tiles: Sequence[Tensor]) -> bool:
    """Whether every page starts at a multiple of 16 bytes, so that elements of several bytes can be read."""
    return all(
        tile.stride(2) == 1 and not any(x % SEGMENT_ALIGNMENT_BYTES for x in (tile.data_ptr(), *tile.stride()[:2]))
        for tile in tiles
    )


def _place(tile: Tensor) -> _Place:
    return tile.data_ptr(), tuple(tile.shape), tile.stride()


@lru_cache(maxsize=16)
def _addresses(places: tuple[_Place, ...], device: torch.device) -> Tensor:
    """Depend on addresses and strides alone, so that a table stays right when memory is given to other pages."""
    parts = [
        start + torch.arange(shape[0])[:, None] * stride[0] + torch.arange(shape[1]) * stride[1]
        for start, shape, stride in places
    ]
    return torch.cat(parts, dim=1).to(device)


def angle_tables(rotary: RotaryTable, tokens: int) -> tuple[Tensor, Tensor]:
    """Make fine ``[2, FINE_POSITIONS, F]`` and coarse ``[2, n, F]`` cosines and sines that cover ``tokens`` positions.

    Position ``p`` is ``p // FINE_POSITIONS`` coarse steps and ``p % FINE_POSITIONS`` fine ones.
    """
    have, need = _ANGLES.get(rotary), rotary_table_entries(tokens)
    if have is None or have[1].shape[1] < need:
        fine, coarse = rotary.tables(tokens)
        have = _ANGLES[rotary] = torch.stack(fine), torch.stack(coarse)
    return have


def turn_table(rotary: RotaryTable, scale: float) -> Tensor:
    """Scale the fine cosines and sines ``[2, FINE_POSITIONS, F]``."""
    kept = _TURNS.setdefault(rotary, {})
    if scale not in kept:
        kept[scale] = torch.stack(rotary.tables(1)[0]) * scale
    return kept[scale]
