"""Decoders of a layer as the C kernel takes them, in 8 bits, and queries in the same order.

Codes are small integers already, so of a product in integers only the decoder is rounded, for every element of a head
to its own step. Latents of many bits have large codes, under which that error would show; they stay in float. The
rounding's effect on the middle code of each latent goes into the bias. What is left is a few hundredths of the codes'
own rounding noise.

A decoder that is in 8 bits in memory is read where it lies, if heads fill the kernel's vectors and rotate in halves.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...layout import SegmentLayout
from ..native import native_library
from ..pack.cpu import NativePlane
from ..page_means import PageMeans
from ..rotary import RotaryTable
from .inputs import PagedPast, Reader, RoundedDecoder, pick

FEWEST_FLOAT_BITS = 8
_TOGETHER = 4  # latents side by side in a decoder of 8 bits
_LARGEST_SUM = 2**15 - 1
_I32, _I64, _POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p


class NativeSegment(ctypes.Structure):
    """``Segment`` of ``attend.c``: a part of every page."""

    _fields_ = [("offset", _I64), ("place", _I64), ("plane", _POINTER), ("planes", _I32), ("latents", _I32)]


class NativeReader(ctypes.Structure):
    """``Reader`` of ``attend.c``: how a segment of the page gives some heads."""

    _fields_ = [
        *((name, _I32) for name in ("segment", "heads", "exact", "groups")),
        *((name, _POINTER) for name in ("head", "matrix", "half")),
        ("matrix_stride", _I64), ("half_stride", _I64), ("decoder", _POINTER), ("decoder_stride", _I64),
        *((name, _POINTER) for name in ("scale", "bias", "stops", "query", "constant", "sums")),
        ("means", _I64), *((name, _POINTER) for name in ("mean_place", "mean_scale", "shifts")),
    ]  # fmt: skip


def latent_bits(segment: SegmentLayout) -> Tensor:
    """Bits of the levels of every latent of a segment without raw ones, int64 ``[R]``."""
    return torch.tensor(segment.level_bits(), dtype=torch.int64)


def decoder_in_8_bits(matrix: Tensor, bias: Tensor, bits: Tensor, head_dim: int) -> RoundedDecoder:
    """Round the decoder ``[R, W]`` of whole heads; ``bits`` int64 ``[R]`` fall.

    Returns:
        The decoder; latents of ``FEWEST_FLOAT_BITS`` bits or more are exact.
    """
    exact = int((bits >= FEWEST_FLOAT_BITS).sum())
    own, highest = matrix[exact:].float(), 2.0 ** bits[exact:].float() - 1
    scale = (own.abs().amax(0) if len(own) else own.new_zeros(own.shape[1])).clamp_min(1e-20) / 127
    rounded = (own / scale).round().clamp(-127, 127)
    middle = (highest / 2) @ (own - rounded * scale)
    together = pad(rounded.to(torch.int8), (0, 0, 0, -len(rounded) % _TOGETHER))
    together = together.view(-1, _TOGETHER, own.shape[1] // head_dim, head_dim).permute(2, 0, 3, 1).contiguous()
    return RoundedDecoder(matrix[:exact].float(), together, scale, bias.float() + middle)


def float_decoder(matrix: Tensor, bias: Tensor, head_dim: int) -> RoundedDecoder:
    """Take the decoder ``[R, W]`` as it is, all of it exact."""
    none = torch.empty(matrix.shape[1] // head_dim, 0, head_dim, _TOGETHER, dtype=torch.int8)
    return RoundedDecoder(matrix.float(), none, torch.ones(matrix.shape[1], dtype=torch.float32), bias.float())


def widening_stops(bits: Sequence[int]) -> list[int]:
    """Find the groups of latents of ``bits`` after which to widen, so that no sum of two latents' products leaves 16 bits.

    A group's products are summed in two pairs. The last stop is the number of groups.
    """
    reach = [127 * (2**bit - 1) for bit in bits] + [0] * (-len(bits) % _TOGETHER)
    stops, sums = [], (0, 0)
    for group in range(len(reach) // _TOGETHER):
        a, b, c, d = reach[_TOGETHER * group : _TOGETHER * (group + 1)]
        if max(sums[0] + a + b, sums[1] + c + d) > _LARGEST_SUM:
            stops.append(group)
            sums = (0, 0)
        sums = (sums[0] + a + b, sums[1] + c + d)
    return [*stops, len(reach) // _TOGETHER]


class NativeDecoders:
    """Readers of one layer as structs of ``attend.c``, made once; every step sets where its queries lie.

    Args:
        paged: of the layer; its readers and rotation are prepared.
        head_dim: elements of a head.
        in_8_bits: whether decoders that are not in 8 bits in memory are rounded to them.

    Attributes:
        segments: array of ``NativeSegment``, those that the readers have.
        keys, values: arrays of ``NativeReader``.
        pairs: rotated pairs of a head; 0 where keys do not turn.
    """

    def __init__(self, paged: PagedPast, head_dim: int, in_8_bits: bool) -> None:
        self._in_8_bits = in_8_bits
        self._key_readers, self._rotary = paged.key_readers, paged.rotary
        columns = int(native_library().kvcar_columns())
        self._head_dim, self._width = head_dim, -(-head_dim // columns) * columns
        self.pairs = 0 if paged.rotary is None else paged.rotary.width // 2
        self._plain_queries = self.pairs > 0 and self._width == head_dim and _is_plain(paged.rotary)
        self._kept: list[object] = []  # what pointers point to
        keys, values = paged.key_readers, paged.value_readers
        found = {reader.segment.offset: reader.segment for reader in (*keys, *values)}
        self._place_of = {offset: index for index, offset in enumerate(found)}
        self.segments = (NativeSegment * len(found))(*map(self._segment, found.values()))
        in_order = torch.arange(head_dim)
        self._order = _pair_order(head_dim, self.pairs, paged.rotary)
        # Keys that do not turn are not decoded; what is folded into their queries stays as it is.
        self._folds = [] if self.pairs else [self._decoder(reader) for reader in keys]
        self.keys = (NativeReader * len(keys))(*(self._reader(r, self._order if self.pairs else None) for r in keys))
        self.values = (NativeReader * len(values))(*(self._reader(r, in_order) for r in values))

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
            q = pad(q, (0, self._width - self._head_dim))
        q = q.contiguous()
        for reader in self.keys:
            reader.query = q.data_ptr()
        return [q]

    def _set_folded(self, q: Tensor) -> list[Tensor]:
        made = []
        for native, reader, decoder in zip(self.keys, self._key_readers, self._folds, strict=True):
            own, heads = pick(q, reader.heads), list(reader.heads)
            folded, constant = q.new_zeros(*q.shape[:3], reader.segment.latents), q.new_zeros(q.shape[:3])
            folded[:, heads], constant[:, heads] = _fold(own, decoder, reader.segment.latents)
            native.query, native.constant = folded.data_ptr(), constant.data_ptr()
            made += [folded, constant]
        return made

    def tensors(self) -> list[Tensor]:
        """All decoders that are pointed to, copies and those of readers."""
        return [kept for kept in self._kept if isinstance(kept, Tensor)]

    def _keep(self, x: Tensor) -> int:
        self._kept.append(x)
        return x.data_ptr()

    def _segment(self, segment: SegmentLayout) -> NativeSegment:
        planes = (NativePlane * len(segment.planes))(*map(NativePlane.of, segment.planes))
        self._kept.append(planes)
        return NativeSegment(segment.offset, 0, ctypes.addressof(planes), len(planes), segment.latents)

    def _decoder(self, reader: Reader) -> RoundedDecoder:
        if reader.rounded is not None:
            return reader.rounded
        assert reader.affine is not None
        if not self._in_8_bits:
            return float_decoder(*reader.affine, self._head_dim)
        return decoder_in_8_bits(*reader.affine, latent_bits(reader.segment), self._head_dim)

    def _reader(self, reader: Reader, order: Tensor | None) -> NativeReader:
        """Point to the decoder with elements of heads in ``order``; to none where that is None."""
        heads = (_I32 * len(reader.heads))(*reader.heads)
        self._kept.append(heads)
        native = NativeReader(
            segment=self._place_of[reader.segment.offset], heads=len(heads), head=ctypes.addressof(heads)
        )
        if order is not None:
            self._point(native, self._ordered(self._decoder(reader), order), latent_bits(reader.segment))
        if reader.means is not None:
            # Keys that do not turn meet queries in the model's order.
            self._point_to_means(native, reader.means, torch.arange(self._head_dim) if order is None else order)
        return native

    def _point_to_means(self, native: NativeReader, means: PageMeans, order: Tensor) -> None:
        """Say where elements of heads, in ``order`` and padded with those of scale 0, lie among the page's mean errors."""
        places = torch.arange(means.layout.width, dtype=torch.int32)[means.columns]
        extra = (0, self._width - self._head_dim)
        native.means = means.layout.offset
        native.mean_place = self._keep(pad(places.view(-1, self._head_dim)[:, order], extra).contiguous())
        native.mean_scale = self._keep(pad(means.scale.view(-1, self._head_dim)[:, order], extra).float().contiguous())

    def _point(self, native: NativeReader, decoder: RoundedDecoder, bits: Tensor) -> None:
        exact, rounded = decoder.exact, decoder.decoder
        native.exact, native.groups = exact.shape[0], rounded.shape[1]
        native.scale, native.bias = self._keep(decoder.scale), self._keep(decoder.bias)
        native.decoder, native.decoder_stride = self._keep(rounded), rounded.stride(0)
        if exact.dtype == torch.float16 and len(exact):
            native.half, native.half_stride, native.matrix_stride = self._keep(exact), exact.stride(0), exact.shape[1]
        else:
            native.matrix, native.matrix_stride = self._keep(exact), exact.stride(0)
        stops = torch.tensor(widening_stops(bits[len(exact) :].tolist()), dtype=torch.int32)
        native.stops = self._keep(stops)

    def _ordered(self, decoder: RoundedDecoder, order: Tensor) -> RoundedDecoder:
        """Bring elements of heads into ``order`` and pad heads; what has both already is not copied."""
        exact, rounded = decoder.exact, decoder.decoder
        if exact.dtype not in (torch.float16, torch.float32):
            exact = exact.float()
        heads, extra = len(rounded), self._width - self._head_dim
        if extra or not torch.equal(order, torch.arange(self._head_dim)):
            exact, scale, bias = (
                pad(x.unflatten(-1, (heads, self._head_dim))[..., order], (0, extra)).flatten(-2)
                for x in (exact, decoder.scale, decoder.bias)
            )
            rounded = pad(rounded[:, :, order], (0, 0, 0, extra))
        else:
            scale, bias = decoder.scale, decoder.bias
        exact = exact if exact.stride(1) == 1 else exact.contiguous()
        rounded = rounded if rounded[:1].is_contiguous() else rounded.contiguous()
        return RoundedDecoder(exact, rounded, scale.float().contiguous(), bias.float().contiguous())


def _fold(q: Tensor, decoder: RoundedDecoder, latents: int) -> tuple[Tensor, Tensor]:
    """Take queries ``[B, heads, Q, D]`` to latents ``[B, heads, Q, R]``; also what the bias adds to their scores."""
    heads, groups, head_dim, _ = decoder.decoder.shape
    exact, scale, bias = (x.float().view(-1, heads, head_dim) for x in (decoder.exact, decoder.scale, decoder.bias))
    rounded = decoder.decoder.float().transpose(1, 2).reshape(heads, head_dim, groups * _TOGETHER)
    parts = q @ exact.permute(1, 2, 0), (q * scale.view(heads, 1, head_dim)) @ rounded
    return torch.cat(parts, dim=-1)[..., :latents], (q @ bias.view(heads, head_dim, 1)).squeeze(-1)


def _is_plain(rotary: RotaryTable | None) -> bool:
    """Whether queries go to the kernel as they are."""
    return rotary is not None and rotary.style == "half" and rotary.attention_scale == 1.0


def _pair_order(head_dim: int, pairs: int, rotary: RotaryTable | None) -> Tensor:
    """List elements of a head in the kernel's order: first of every rotated pair, second of every pair, the rest."""
    index = torch.arange(head_dim)
    if rotary is None or rotary.style == "half":
        return index
    return torch.cat([index[0 : 2 * pairs : 2], index[1 : 2 * pairs : 2], index[2 * pairs :]])
