"""Tables that the Triton kernels read, made once and kept: a layer's readers in banks, where its pages lie, angles."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, is_dataclass
from functools import cached_property, lru_cache
from typing import TypeVar

import torch
from torch import Tensor

from ...layout import SEGMENT_ALIGNMENT_BYTES, SegmentLayout
from ...sizes import rotary_table_entries
from ..page_means import PageMeans
from ..plane_table import (
    BRANCHES,
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
from .inputs import Reader, RoundedDecoder

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
        fields: of their latents in slots, as in ``PlaneTable``.
        affine: matrix ``[slots, len(heads) * D]`` and bias of a decoder in floats.
        rounded: the decoder in 8 bits, where it lies; without either the latents are the one head itself.
        slots: of the latents of a decoder in 8 bits, int64 ``[R]``.
        means: what pages add to the decoded vectors.
    """

    heads: tuple[int, ...]
    fields: Tensor
    affine: tuple[Tensor, Tensor] | None
    rounded: RoundedDecoder | None = None
    slots: Tensor | None = None
    means: PageMeans | None = None

    @property
    def latents(self) -> int:
        """Slots read."""
        return self.fields.shape[-1]

    def mean_rows(self) -> tuple[int, Tensor, Tensor]:
        """Bytes into the page where mean errors lie; which of them each column has and their scales, ``[1, len(heads) * D]``."""
        if self.means is None:
            width = self.matrix_and_bias()[1].shape[-1]
            return 0, torch.zeros(1, width, dtype=torch.int32), torch.zeros(1, width)
        places = torch.arange(self.means.layout.width, dtype=torch.int32)[self.means.columns]
        return self.means.layout.offset, places[None], self.means.scale[None]

    def matrix_and_bias(self) -> tuple[Tensor, Tensor]:
        """Matrix float32 ``[slots, len(heads) * D]`` and bias of the decoder; of one in 8 bits made anew."""
        if self.affine is not None:
            return self.affine
        assert self.rounded is not None
        assert self.slots is not None
        matrix, bias = self.rounded.affine(len(self.slots))
        return in_slots(matrix, self.slots, self.latents), bias

    def rows_in_8_bits(self) -> tuple[Tensor, Tensor, Tensor]:
        """Decoder in units of each column: int8 and, of the latents that are not in 8 bits, float32 ``[slots, W]``; units ``[W]``."""
        assert self.rounded is not None
        assert self.slots is not None
        own, exact = self.rounded.decoder.permute(1, 3, 0, 2).flatten(2).flatten(0, 1), self.rounded.exact.float()
        own = own[: len(self.slots) - len(exact)]
        unit = self.rounded.scale if len(own) else exact.abs().amax(0).clamp_min(_SMALLEST_UNIT)
        rows = torch.cat([own.new_zeros(exact.shape), own]), torch.cat([exact / unit, exact.new_zeros(own.shape)])
        in8, wide = (in_slots(part, self.slots, self.latents) for part in rows)
        return in8, wide, unit

    @property
    def exact_slots(self) -> int:
        """First slots among which all latents are whose decoder is not in 8 bits."""
        if self.rounded is None or self.slots is None or not len(self.rounded.exact):
            return 0
        return int(self.slots[: len(self.rounded.exact)].max()) + 1


@dataclass(frozen=True, eq=False)
class Bank:
    """Groups that one launch computes.

    Attributes:
        groups: coded ones with decoders in floats, or in 8 bits, or lossless ones.
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
        return self.groups[0].affine is not None or self.rounded

    @property
    def rounded(self) -> bool:
        """Whether the groups have decoders in 8 bits."""
        return self.groups[0].rounded is not None

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
        by_words = whole_pages(tile, page_tokens) and not self.with_elements and not self.table.widths & BRANCHES
        return (self.words if by_words else self.table.fields), by_words

    @cached_property
    def heads(self) -> Tensor:
        """Heads of all groups, int32."""
        heads = [head for group in self.groups for head in group.heads]
        return torch.tensor(heads, dtype=torch.int32, device=self.device)

    @cached_property
    def fits_float16(self) -> bool:
        """Whether the decoders' matrices are as exact as needed in float16 (codes always are, and so are matrices in 8 bits)."""
        if self.rounded:
            return all(float(group.rows_in_8_bits()[1].abs().max()) < _FLOAT16_LARGEST for group in self.groups)
        largest = [float(group.affine[0].abs().max()) for group in self.groups if group.affine is not None]
        return all(_FLOAT16_SMALLEST < value < _FLOAT16_LARGEST for value in largest)

    @cached_property
    def keys_fit_float16(self) -> bool:
        """Whether decoded keys lie within float16's range, whatever their codes and angles."""
        return not self.with_elements and all(
            float((highest_codes(group.fields).to(self.device) @ matrix.abs() + bias.abs()).max())
            < _FLOAT16_LARGEST_KEY
            for group in self.groups
            if self.coded
            for matrix, bias in [group.matrix_and_bias()]
        )

    @property
    def head_starts(self) -> list[int]:
        """Place in ``heads`` of every group's first."""
        counts = [len(group.heads) for group in self.groups]
        return [sum(counts[:index]) for index in range(len(counts))]

    @property
    def has_means(self) -> bool:
        """Whether pages add mean errors to vectors of any group."""
        return any(group.means is not None for group in self.groups)

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

    def tensors(self) -> list[Tensor]:
        """All that was made for it, and copies of decoders in floats."""
        own = [
            self.made,
            [group.affine for group in self.groups],
            {k: v for k, v in vars(self).items() if k in _CACHED},
        ]
        return list(_tensors_in(own))


@dataclass(frozen=True, eq=False)
class KeyDecoder:
    """Decoders of a bank's keys, their columns in the order of the decoding kernel.

    Attributes:
        items, matrix, bias, exact, unit, means: as ``decode_scores`` takes them; no means where pages have none.
        exact_blocks: first blocks of latents of an item that have rows in ``exact``.
        heads_together: heads of the item that has most.
        block_pairs, block_rest: columns, padded, of the pairs' elements and of the rest.
    """

    items: Tensor
    matrix: Tensor
    bias: Tensor
    exact: Tensor
    unit: Tensor
    exact_blocks: int
    heads_together: int
    block_pairs: int
    block_rest: int
    means: MeanTable | None


@dataclass(frozen=True, eq=False)
class MeanTable:
    """Where mean errors of pages lie for each row of a table, ``[n]``, and for its columns: which of them, and their scales."""

    offset: Tensor
    place: Tensor
    scale: Tensor


_ANGLES: weakref.WeakKeyDictionary[RotaryTable, tuple[Tensor, Tensor]] = weakref.WeakKeyDictionary()
_TURNS: weakref.WeakKeyDictionary[RotaryTable, dict[float, Tensor]] = weakref.WeakKeyDictionary()
_KEPT = "triton banks"
_CACHED = ("table", "words", "heads")
_SMALLEST_UNIT = 1e-20


@dataclass(frozen=True)
class _Banks:
    """Banks that a reader begins, by the readers beside it; see ``KeepsTensors``."""

    by_readers: dict[tuple[int | weakref.ref[Reader], ...], tuple[Bank, ...]] = field(default_factory=dict)

    def tensors(self) -> list[Tensor]:
        """All tensors of all banks."""
        return [tensor for own in self.by_readers.values() for bank in own for tensor in bank.tensors()]


def _tensors_in(value: object) -> Iterator[Tensor]:
    """Tensors in containers and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _tensors_in(each)
    elif is_dataclass(value):
        yield from _tensors_in(vars(value))
    elif isinstance(value, PlaneTable):
        yield from (value.fields, value.present)


def banks(readers: tuple[Reader, ...], device: torch.device, longest_block: int) -> tuple[Bank, ...]:
    """Sort ``readers`` into banks that together give all heads: of decoders in floats, of those in 8 bits, of lossless heads."""
    kept = readers[0].kept.setdefault(_KEPT, _Banks())
    assert isinstance(kept, _Banks)
    key = longest_block, *(weakref.ref(reader) for reader in readers)
    if key not in kept.by_readers:
        coded = [_coded_group(reader) for reader in readers if not reader.segment.lossless]
        lossless = [g for reader in readers if reader.segment.lossless for g in _lossless_groups(reader)]
        exact = next((reader.exact_dtype for reader in readers if reader.segment.lossless), torch.float16)
        floats, in8 = ([g for g in coded if (g.rounded is not None) == whether] for whether in (False, True))
        pairs = [(floats, torch.float16), (in8, torch.float16), (lossless, exact)]
        kept.by_readers[key] = tuple(
            Bank(tuple(groups), element, longest_block, device) for groups, element in pairs if groups
        )
    return kept.by_readers[key]


def in_slots(rows: Tensor, slots: Tensor, count: int) -> Tensor:
    """Put rows ``[R, W]`` in their slots, ``[count, W]``; zeros in between."""
    out = rows.new_zeros(count, rows.shape[1])
    out[slots.to(rows.device)] = rows
    return out


def _coded_group(reader: Reader) -> Group:
    """Latents in slots; those that are none have no bits and rows of 0 in the decoder's matrix."""
    slots = word_slots(reader.segment)
    fields = spread(segment_fields(reader.segment), slots)
    if reader.rounded is not None:
        return Group(reader.heads, fields, None, reader.rounded, slots, reader.means)
    matrix, bias = reader.matrix_and_bias()
    return Group(reader.heads, fields, (in_slots(matrix, slots, fields.shape[-1]), bias), means=reader.means)


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
    blocks, block = bank.table.blocks, bank.table.block
    exact_blocks = max(-(-group.exact_slots // block) for group in bank.groups)
    items, parts, offsets, means = [], [], [], []
    for index, group in enumerate(bank.groups):
        matrix, bias = group.matrix_and_bias()
        at_means, *of_means = group.mean_rows() if bank.has_means else (0,)
        whole = (matrix.to(dtype), bias[None])
        if bank.rounded:
            in8, exact, unit = group.rows_in_8_bits()
            whole = (in8, bias[None], exact[: exact_blocks * block].to(dtype), unit[None])
        for first in range(0, len(group.heads), together):
            count = min(together, len(group.heads) - first)
            wanted = slice(first * head_dim, (first + count) * head_dim)
            rows = len(items) * blocks
            items.append((index * blocks, bank.head_starts[index] + first, count, rows))
            parts.append([_columns(part[:, wanted], count, rotary, block_pairs, block_rest) for part in whole])
            means.append([_columns(part[:, wanted], count, rotary, block_pairs, block_rest) for part in of_means])
            offsets.append(at_means)
    heights = (blocks * block, 1, exact_blocks * block, 1)
    filled = [
        torch.cat([torch.nn.functional.pad(part, (0, 0, 0, height - len(part))) for part in own])
        for own, height in zip(zip(*parts, strict=True), heights, strict=False)
    ]
    matrix, bias, exact, unit = filled if bank.rounded else (*filled, *filled)
    table = torch.tensor(items, dtype=torch.int32, device=bank.device)
    own_means = _mean_table(offsets, means, bank.device) if bank.has_means else None
    return KeyDecoder(table, matrix, bias, exact, unit, exact_blocks, together, block_pairs, block_rest, own_means)


def value_means(bank: Bank, head_dim: int) -> MeanTable:
    """Mean errors of a bank's values, a row for each of its heads."""
    offsets, means = [], []
    for group in bank.groups:
        offset, *parts = group.mean_rows()
        offsets += [offset] * len(group.heads)
        means += zip(*(part.split(head_dim, dim=1) for part in parts), strict=True)
    return _mean_table(offsets, means, bank.device)


def _mean_table(offsets: list[int], rows: Sequence[Sequence[Tensor]], device: torch.device) -> MeanTable:
    place, scale = (torch.cat([part.to(device) for part in own]) for own in zip(*rows, strict=True))
    return MeanTable(torch.tensor(offsets, dtype=torch.int32, device=device), place.contiguous(), scale.contiguous())


def _columns(matrix: Tensor, heads: int, rotary: RotaryTable, block_pairs: int, block_rest: int) -> Tensor:
    """Columns ``[R, 2 * block_pairs + block_rest]`` of ``[R, heads * D]``.

    8 first elements of pairs, their 8 second ones, and so on, then what is not rotated.
    """
    parts = (part.flatten(1) for part in split_pairs(matrix.unflatten(-1, (heads, -1)), rotary))
    sizes = (block_pairs, block_pairs, block_rest)
    first, second, rest = (torch.nn.functional.pad(x, (0, n - x.shape[1])) for x, n in zip(parts, sizes, strict=True))
    pairs = torch.stack([first.unflatten(1, (-1, 8)), second.unflatten(1, (-1, 8))], dim=2).flatten(1)
    return torch.cat([pairs, rest], dim=1)


@dataclass(frozen=True, eq=False)
class ValueDecoder:
    """Decoders of a bank's values as ``merge_pieces`` takes them: ``matrix`` in floats, or ``places`` and ``latent_of`` in 8 bits.

    Attributes:
        held: what ``places`` are addresses in.
        exact_dtype: of rows that are not in 8 bits.
    """

    matrix: Tensor
    bias: Tensor
    places: Tensor
    latent_of: Tensor
    held: tuple[Tensor, ...] = ()
    exact_dtype: torch.dtype = torch.float16


def value_decoder(bank: Bank, head_dim: int) -> ValueDecoder:
    """Decoders of a bank's values; those in 8 bits stay where they are."""
    nothing = torch.empty(0, dtype=torch.int64, device=bank.device)
    if not bank.coded:
        return ValueDecoder(nothing.float(), nothing.float(), nothing, nothing)
    padded = bank.table.blocks * bank.table.block
    if bank.rounded:
        return _value_decoder_in_8_bits(bank, head_dim, padded)
    matrices, biases = [], []
    for group in bank.groups:
        matrix, bias = (part.float() for part in group.matrix_and_bias())
        matrices += list(torch.nn.functional.pad(matrix, (0, 0, 0, padded - len(matrix))).split(head_dim, dim=1))
        biases += list(bias.split(head_dim))
    return ValueDecoder(torch.cat(matrices), torch.stack(biases), nothing, nothing)


def _value_decoder_in_8_bits(bank: Bank, head_dim: int, padded: int) -> ValueDecoder:
    places, held, latent_of, biases = [], [], [], []
    for group in bank.groups:
        assert group.rounded is not None
        assert group.slots is not None
        own = torch.full((padded,), -1, dtype=torch.int32)
        own[group.slots] = torch.arange(len(group.slots), dtype=torch.int32)
        latent_of.append(own)
        decoder, scale = group.rounded.decoder.contiguous(), group.rounded.scale.float().contiguous()
        exact = group.rounded.exact if group.rounded.exact.stride(1) == 1 else group.rounded.exact.contiguous()
        held += [decoder, scale, exact]
        biases += list(group.rounded.bias.float().split(head_dim))
        for head in range(len(group.heads)):
            columns = slice(head * head_dim, (head + 1) * head_dim)
            addresses = (part.data_ptr() for part in (decoder[head], exact[:, columns], scale[columns]))
            places.append((*addresses, len(exact), exact.stride(0)))
    table = torch.tensor(places, dtype=torch.int64, device=bank.device)
    nothing, dtype = torch.empty(0, device=bank.device, dtype=torch.float32), held[-1].dtype
    latents = torch.cat(latent_of).to(bank.device)
    return ValueDecoder(nothing, torch.stack(biases), table, latents, tuple(held), dtype)


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
