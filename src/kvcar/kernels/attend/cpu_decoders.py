"""Decoders of a layer as the C kernel takes them, those of keys rounded to 8 bits, and queries in the same order.

Codes are small integers already, so of a product in integers only the decoder is rounded, for every element of a head
to its own step. Latents of many bits have large codes, under which that error would show; they stay in float. The
rounding's effect on the middle code of each latent goes into the bias. What is left is a few hundredths of the codes'
own rounding noise.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from ...layout import SegmentLayout
from ..native import native_library
from ..pack.cpu import NativePlane
from ..rotary import RotaryTable
from .inputs import PagedPast, Reader, pick

FEWEST_FLOAT_BITS = 8
_LARGEST_SUM = 2**15 - 1
_I32, _I64, _POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p


class NativeReader(ctypes.Structure):
    """``Reader`` of ``attend.c``: how a segment of the page gives some heads."""

    _fields_ = [
        ("offset", _I64),
        *((name, _I32) for name in ("latents", "planes", "heads", "exact", "stops_stride", "spare")),
        *((name, _POINTER) for name in ("plane", "head", "matrix", "bias", "narrow", "scale", "stops")),
        *((name, _POINTER) for name in ("query", "constant", "sums")),
    ]  # fmt: skip


class Decoder8(NamedTuple):
    """A decoder for codes ``u``: ``u[:exact] @ matrix + (u[exact:] @ rounded) * scale + bias``.

    Attributes:
        exact: leading latents that stay in float.
        rounded: int8 ``[R - exact, D]``.
        scale, bias: float32 ``[D]``.
        stops: pairs of latents, counted from ``exact`` on, after which sums of 16 bits must be widened; the last is
            all.
    """

    exact: int
    rounded: Tensor
    scale: Tensor
    bias: Tensor
    stops: list[int]


def latent_bits(segment: SegmentLayout) -> Tensor:
    """Count the bits of every latent of a segment without raw ones, int64 ``[R]``."""
    bits = torch.zeros(segment.latents, dtype=torch.int64)
    for plane in segment.planes:
        bits[plane.start : plane.stop] += plane.bits
    return bits


def decoder_in_8_bits(matrix: Tensor, bias: Tensor, bits: Tensor) -> Decoder8:
    """Round the decoder ``[R, D]`` of one head; ``bits`` int64 ``[R]`` fall.

    Returns:
        The decoder; latents of ``FEWEST_FLOAT_BITS`` bits or more are exact.
    """
    exact = int((bits >= FEWEST_FLOAT_BITS).sum())
    own, highest = matrix[exact:].float(), 2.0 ** bits[exact:].float() - 1
    scale = (own.abs().amax(0) if len(own) else own.new_zeros(own.shape[1])).clamp_min(1e-20) / 127
    rounded = (own / scale).round().clamp(-127, 127)
    middle = (highest / 2) @ (own - rounded * scale)
    return Decoder8(exact, rounded.to(torch.int8), scale, bias.float() + middle, _stops(rounded, highest))


def _stops(rounded: Tensor, highest: Tensor) -> list[int]:
    """Find the pairs after which to widen, so that no sum of codes up to ``highest`` leaves 16 bits."""
    if len(rounded) % 2:
        rounded = torch.cat([rounded, rounded.new_zeros(1, rounded.shape[1])])
        highest = torch.cat([highest, highest[:1]])
    reach = (rounded * highest[:, None]).unflatten(0, (-1, 2))
    up, down = reach.clamp_min(0).sum(1), (-reach).clamp_min(0).sum(1)
    stops, sums = [], torch.zeros(2, rounded.shape[1])
    for pair, own in enumerate(torch.stack([up, down], 1)):
        if float((sums + own).max()) > _LARGEST_SUM:
            stops.append(pair)
            sums = torch.zeros_like(sums)
        sums = sums + own
    return [*stops, len(reach)]


class NativeDecoders:
    """Readers of one layer as structs of ``attend.c``, made once; every step sets where its queries and sums lie.

    Args:
        paged: of the layer; its readers and rotation are prepared.
        head_dim: elements of a head.
        in_8_bits: whether decoders of keys are rounded to 8 bits where the CPU multiplies those faster.

    Attributes:
        keys, values: arrays of ``NativeReader``.
        pairs: rotated pairs of a head; 0 where keys do not turn.
    """

    def __init__(self, paged: PagedPast, head_dim: int, in_8_bits: bool) -> None:
        library = native_library()
        self._columns = int(library.kvcar_columns())
        self._latents_together = int(library.kvcar_decode8_latents())
        self._in_8_bits = in_8_bits and self._latents_together > 0
        self._key_readers, self._rotary = paged.key_readers, paged.rotary
        self._head_dim, self._width = head_dim, self.rounded(head_dim)
        self.pairs = 0 if paged.rotary is None else paged.rotary.width // 2
        self._order = _pair_order(head_dim, self.pairs, paged.rotary)
        self._plain_queries = self.pairs > 0 and self._width == head_dim and _is_plain(paged.rotary)
        self._folds: dict[int, tuple[Tensor, Tensor]] = {}
        self._kept: list[object] = []  # what pointers point to
        keys, values = paged.key_readers, paged.value_readers
        self.keys = (NativeReader * len(keys))(*(self._key_reader(i, r) for i, r in enumerate(keys)))
        self.values = (NativeReader * len(values))(*(self._value_reader(r) for r in values))

    def rounded(self, n: int) -> int:
        """Round ``n`` floats up to whole blocks of the kernel's columns."""
        return -(-n // self._columns) * self._columns

    def set_queries(self, query: Tensor, heads: int) -> list[Tensor]:
        """Point readers to queries ``[B, Hq, T, D]`` in the order of pairs and padded, or folded into their latents.

        Returns:
            Tensors that must live until the kernel is done; ``query`` must too.
        """
        if self._plain_queries:
            place = query.data_ptr()
            for reader in self.keys:
                reader.query = place
            return []
        q = query.view(query.shape[0], heads, -1, query.shape[3])
        return self._set_turning(q) if self.pairs else self._set_folded(q)

    def _set_turning(self, q: Tensor) -> list[Tensor]:
        assert self._rotary is not None
        if self._rotary.style == "interleaved":
            q = q[..., self._order]
        if self._rotary.attention_scale != 1.0:
            # Scales the rotated elements of keys; of queries, which is the same.
            q = torch.cat([q[..., : 2 * self.pairs] * self._rotary.attention_scale, q[..., 2 * self.pairs :]], -1)
        if self._width != self._head_dim:
            q = torch.nn.functional.pad(q, (0, self._width - self._head_dim))
        q = q.contiguous()
        for reader in self.keys:
            reader.query = q.data_ptr()
        return [q]

    def _set_folded(self, q: Tensor) -> list[Tensor]:
        made = []
        for index, reader in enumerate(self._key_readers):
            matrix, bias = self._folds[index]
            own, heads = pick(q, reader.heads), list(reader.heads)
            folded, constant = q.new_zeros(*q.shape[:3], reader.segment.latents), q.new_zeros(q.shape[:3])
            folded[:, heads] = own @ matrix
            constant[:, heads] = (own @ bias).squeeze(-1)
            self.keys[index].query, self.keys[index].constant = folded.data_ptr(), constant.data_ptr()
            made += [folded, constant]
        return made

    def _keep(self, x: Tensor) -> int:
        x = x.contiguous()
        self._kept.append(x)
        return x.data_ptr()

    def _reader(self, reader: Reader) -> NativeReader:
        segment = reader.segment
        planes = (NativePlane * len(segment.planes))(*map(NativePlane.of, segment.planes))
        heads = (_I32 * len(reader.heads))(*reader.heads)
        self._kept += [planes, heads]
        return NativeReader(
            offset=segment.offset, latents=segment.latents, exact=segment.latents, planes=len(planes), heads=len(heads),
            plane=ctypes.addressof(planes), head=ctypes.addressof(heads),
        )  # fmt: skip

    def _by_head(self, reader: Reader, order: Tensor) -> tuple[Tensor, Tensor]:
        """Split by head: decoder ``[heads, R, padded D]``, bias ``[heads, padded D]``, elements in ``order``."""
        assert reader.affine is not None
        matrix, bias = reader.affine
        heads, extra = len(reader.heads), self._width - self._head_dim
        by_head = matrix.float().unflatten(1, (heads, self._head_dim)).transpose(0, 1)[..., order]
        own_bias = bias.float().view(heads, self._head_dim)[:, order]
        return torch.nn.functional.pad(by_head, (0, extra)), torch.nn.functional.pad(own_bias, (0, extra))

    def _value_reader(self, reader: Reader) -> NativeReader:
        native = self._reader(reader)
        matrix, bias = self._by_head(reader, torch.arange(self._head_dim))
        native.matrix, native.bias = self._keep(matrix), self._keep(bias)
        return native

    def _key_reader(self, index: int, reader: Reader) -> NativeReader:
        """Take the decoder in blocks of columns, or, where keys do not turn, keep it aside to fold into queries."""
        native = self._reader(reader)
        matrix, bias = self._by_head(reader, self._order)
        if not self.pairs:
            matrix, bias = matrix[..., : self._head_dim], bias[:, : self._head_dim]
            self._folds[index] = (matrix.transpose(1, 2).contiguous(), bias[:, :, None])
            return native
        if self._in_8_bits and self._round(native, matrix, bias, latent_bits(reader.segment)):
            return native
        native.matrix = self._keep(matrix.unflatten(2, (-1, self._columns)).transpose(1, 2))
        native.bias = self._keep(bias)
        return native

    def _round(self, native: NativeReader, matrix: Tensor, bias: Tensor, bits: Tensor) -> bool:
        """Round decoders ``[heads, R, padded D]``, latents that are multiplied together side by side.

        Returns:
            False, with nothing done, where all latents have too many bits for it.
        """
        heads = [decoder_in_8_bits(m, b, bits) for m, b in zip(matrix, bias, strict=True)]
        exact = heads[0].exact
        if exact == native.latents:
            return False
        stacked, together = torch.stack([head.rounded for head in heads]), self._latents_together
        stacked = torch.nn.functional.pad(stacked, (0, 0, 0, -stacked.shape[1] % together))
        native.narrow = self._keep(stacked.unflatten(1, (-1, together)).transpose(2, 3))
        native.stops_stride = 1 + max(len(head.stops) for head in heads)
        rows = [[len(h.stops), *h.stops, *[0] * (native.stops_stride - 1 - len(h.stops))] for h in heads]
        native.stops = self._keep(torch.tensor(rows, dtype=torch.int32))
        native.scale = self._keep(torch.stack([head.scale for head in heads]))
        native.exact = exact
        native.matrix = self._keep(matrix[:, :exact])
        native.bias = self._keep(torch.stack([head.bias for head in heads]))
        return True


def _is_plain(rotary: RotaryTable | None) -> bool:
    """Whether queries go to the kernel as they are."""
    return rotary is not None and rotary.style == "half" and rotary.attention_scale == 1.0


def _pair_order(head_dim: int, pairs: int, rotary: RotaryTable | None) -> Tensor:
    """List elements of a head in the kernel's order: first of every rotated pair, second of every pair, the rest."""
    index = torch.arange(head_dim)
    if rotary is None or rotary.style == "half":
        return index
    return torch.cat([index[0 : 2 * pairs : 2], index[1 : 2 * pairs : 2], index[2 * pairs :]])
