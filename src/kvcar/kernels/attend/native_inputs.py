"""What the C kernel of attention is given: the structs of ``native/attend.c`` and the tensors they point to."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from weakref import ref

import torch
from torch import Tensor

from ..layout import SegmentLayout
from ..native import native_library
from .decode8 import decoder_in_8_bits, latent_bits
from .inputs import ExactPast, PagedPast, Reader, pick

_I32, _I64, _POINTER, _F32 = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p, ctypes.c_float


class _Plane(ctypes.Structure):
    _fields_ = [(name, _I32) for name in ("bits", "shift", "start", "count", "rows", "offset")]


class _Reader(ctypes.Structure):
    _fields_ = [
        ("offset", _I64),
        *((name, _I32) for name in ("latents", "planes", "heads", "exact", "stops_stride", "spare")),
        *((name, _POINTER) for name in ("plane", "head", "matrix", "bias", "narrow", "scale", "stops", "query", "constant")),
        ("sums", _POINTER),
    ]  # fmt: skip


class _Arena(ctypes.Structure):
    _fields_ = [("base", _POINTER), *((name, _I64) for name in ("batch_stride", "page_stride", "pages", "page_bytes"))]


class _Side(ctypes.Structure):
    _fields_ = [("base", _POINTER), ("batch_stride", _I64), ("head_stride", _I64), ("token_stride", _I64)]


class _Part(ctypes.Structure):
    _fields_ = [("keys", _Side), ("values", _Side), ("tokens", _I64), ("is_bfloat16", _I32), ("spare", _I32)]


class _Job(ctypes.Structure):
    _fields_ = [
        *((name, _I32) for name in ("batch", "heads", "rows", "head_dim", "page_tokens", "pairs", "splits", "threads")),
        ("tokens", _I64), ("first", _POINTER), ("offset", _POINTER), ("page_index", _POINTER),
        ("fine_cos", _POINTER), ("fine_sin", _POINTER), ("coarse_cos", _POINTER), ("coarse_sin", _POINTER),
        ("softcap", _F32), ("key_readers", _I32), ("value_readers", _I32), ("arenas", _I32),
        ("keys", _POINTER), ("values", _POINTER), ("arena", _POINTER), ("most", _POINTER), ("mass", _POINTER),
        ("query", _POINTER), ("part", _POINTER), ("mask", _POINTER),
        ("mask_batch_stride", _I64), ("mask_row_stride", _I64), ("mask_token_stride", _I64), ("mask_rows", _I32),
        ("parts", _I32), ("scattered", _I32), ("spare", _I32), ("out", _POINTER),
    ]  # fmt: skip


class NativeJob:
    """One layer's job: decoders in the kernel's order, made once, and pointers that every step sets anew.

    Args:
        paged: of the layer; its readers and rotation are what is prepared.
        head_dim: elements of a head.
        in_8_bits: whether decoders of keys are rounded to 8 bits where the CPU multiplies those faster.
    """

    def __init__(self, paged: PagedPast, head_dim: int, in_8_bits: bool = True) -> None:
        self._columns = int(native_library().kvcar_columns())
        self._in_8_bits = in_8_bits and bool(native_library().kvcar_has_decode8())
        self._key_readers, self._value_readers, self._rotary = paged.key_readers, paged.value_readers, paged.rotary
        self._head_dim, self._width = head_dim, self._rounded(head_dim)
        self._pairs = 0 if paged.rotary is None else paged.rotary.width // 2
        self._order = _pair_order(head_dim, self._pairs, paged)
        self._kept: list[object] = []  # what pointers point to
        self._folds: dict[int, tuple[Tensor, Tensor]] = {}
        self._tiles: tuple[ref[Tensor], ...] = ()
        self._arenas = (_Arena * 0)()
        keys, values = paged.key_readers, paged.value_readers
        self._keys = (_Reader * len(keys))(*(self._key_reader(i, r) for i, r in enumerate(keys)))
        self._values = (_Reader * len(values))(*(self._value_reader(r) for r in values))
        self.struct = _Job(
            head_dim=head_dim, page_tokens=keys[0].segment.page_tokens, pairs=self._pairs, key_readers=len(keys),
            value_readers=len(values), keys=ctypes.addressof(self._keys), values=ctypes.addressof(self._values),
        )  # fmt: skip

    def is_for(self, paged: PagedPast) -> bool:
        """Whether it was made for the readers and the rotation of ``paged``."""
        return (
            paged.key_readers is self._key_readers
            and paged.value_readers is self._value_readers
            and paged.rotary is self._rotary
        )

    def run(self, q: Tensor, exact: ExactPast, paged: PagedPast, softcap: float | None, tokens: int) -> Tensor:
        """Attention of scaled queries float32 ``[B, H, Q, D]``, row ``r`` of token ``r % tokens``; the output likewise.

        Raises:
            MemoryError: none is left for the kernel's scratch.
        """
        batch, heads, rows, dim = q.shape
        q = q.contiguous()
        threads = torch.get_num_threads()
        pages = -(-paged.tokens // paged.key_readers[0].segment.page_tokens)
        # Two splits a thread even out threads of unequal speed; many sequences need none.
        splits = max(1, min(pages, -(-2 * threads // batch)))
        out = torch.empty(batch, heads, rows, dim)
        most, mass = torch.empty(2, batch, splits + 1, heads * rows).unbind(0)
        job = self.struct
        job.batch, job.heads, job.rows, job.splits, job.threads = batch, heads, rows, splits, threads
        job.softcap, job.query, job.out = softcap or 0.0, q.data_ptr(), out.data_ptr()
        job.most, job.mass = most.data_ptr(), mass.data_ptr()
        # Everything that is pointed to has a name here until the kernel is done.
        kept = (self._sums(batch, splits, rows), self._pages(paged), self._queries(q), self._exact(exact, tokens))
        if native_library().kvcar_attend(ctypes.byref(job)):
            raise MemoryError("no memory for the scratch of attention over pages")
        del kept
        return out

    # Made once

    def _rounded(self, n: int) -> int:
        return -(-n // self._columns) * self._columns

    def _keep(self, x: Tensor) -> int:
        x = x.contiguous()
        self._kept.append(x)
        return x.data_ptr()

    def _reader(self, reader: Reader) -> _Reader:
        planes = _planes(reader.segment)
        heads = (_I32 * len(reader.heads))(*reader.heads)
        self._kept += [planes, heads]
        segment = reader.segment
        return _Reader(
            offset=segment.offset, latents=segment.latents, exact=segment.latents, planes=len(planes), heads=len(heads),
            plane=ctypes.addressof(planes), head=ctypes.addressof(heads),
        )  # fmt: skip

    def _by_head(self, reader: Reader, order: Tensor) -> tuple[Tensor, Tensor]:
        """Decoder ``[heads, R, padded D]`` and bias ``[heads, padded D]`` with elements of a head in ``order``."""
        assert reader.affine is not None
        matrix, bias = reader.affine
        heads, extra = len(reader.heads), self._width - self._head_dim
        by_head = matrix.float().unflatten(1, (heads, self._head_dim)).transpose(0, 1)[..., order]
        own_bias = bias.float().view(heads, self._head_dim)[:, order]
        return torch.nn.functional.pad(by_head, (0, extra)), torch.nn.functional.pad(own_bias, (0, extra))

    def _value_reader(self, reader: Reader) -> _Reader:
        native = self._reader(reader)
        matrix, bias = self._by_head(reader, torch.arange(self._head_dim))
        native.matrix, native.bias = self._keep(matrix), self._keep(bias)
        return native

    def _key_reader(self, index: int, reader: Reader) -> _Reader:
        """With the decoder in blocks of columns, or, where keys do not turn, kept aside to fold into queries."""
        native = self._reader(reader)
        matrix, bias = self._by_head(reader, self._order)
        if not self._pairs:
            matrix, bias = matrix[..., : self._head_dim], bias[:, : self._head_dim]
            self._folds[index] = (matrix.transpose(1, 2).contiguous(), bias[:, :, None])
            return native
        if self._in_8_bits:
            bits = latent_bits(reader.segment)
            parts = [decoder_in_8_bits(m, b, bits) for m, b in zip(matrix, bias, strict=True)]
            native.exact = parts[0].exact
            if native.exact < native.latents:
                self._round(native, [p.rounded for p in parts], [p.stops for p in parts])
                native.scale, bias = (
                    self._keep(torch.stack([p.scale for p in parts])),
                    torch.stack([p.bias for p in parts]),
                )
                native.matrix, native.bias = self._keep(matrix[:, : native.exact]), self._keep(bias)
                return native
        native.matrix = self._keep(matrix.unflatten(2, (-1, self._columns)).transpose(1, 2))
        native.bias = self._keep(bias)
        return native

    def _round(self, native: _Reader, rounded: list[Tensor], stops: list[list[int]]) -> None:
        """Hand over decoders int8 ``[latents, padded D]`` of every head, pairs of latents side by side."""
        stacked = torch.stack(rounded)
        stacked = torch.nn.functional.pad(stacked, (0, 0, 0, stacked.shape[1] % 2))
        native.narrow = self._keep(stacked.unflatten(1, (-1, 2)).transpose(2, 3))
        native.stops_stride = 1 + max(map(len, stops))
        rows = [[len(own), *own, *[0] * (native.stops_stride - 1 - len(own))] for own in stops]
        native.stops = self._keep(torch.tensor(rows, dtype=torch.int32))

    # Set anew

    def _sums(self, batch: int, splits: int, rows: int) -> list[Tensor]:
        made = []
        for native in self._values:
            made.append(torch.empty(batch, splits, native.heads * rows, self._rounded(native.latents)))
            native.sums = made[-1].data_ptr()
        return made

    def _pages(self, paged: PagedPast) -> object:
        job = self.struct
        first, offset = paged.first.contiguous(), paged.offset.contiguous()
        job.tokens, job.first, job.offset = paged.tokens, first.data_ptr(), offset.data_ptr()
        index = None if paged.pages is None else paged.pages.contiguous()
        job.page_index, job.scattered = None if index is None else index.data_ptr(), int(paged.scattered)
        arenas = self._arenas_of(paged.tiles)
        job.arenas, job.arena = len(arenas), ctypes.addressof(arenas)
        if paged.rotary is None:
            return first, offset, arenas, index
        # Of some pages, the last may lie as far back as the tiles reach, or, gathered, farther.
        fine, coarse = paged.rotary.tables(self._reach(paged))
        job.fine_cos, job.fine_sin = fine[0].data_ptr(), fine[1].data_ptr()
        job.coarse_cos, job.coarse_sin = coarse[0].data_ptr(), coarse[1].data_ptr()
        return first, offset, arenas, index, fine, coarse

    def _arenas_of(self, tiles: Sequence[Tensor]) -> ctypes.Array[_Arena]:
        """Where the tiles lie; the same from step to step until one is added or replaced."""
        if len(tiles) != len(self._tiles) or any(own() is not t for own, t in zip(self._tiles, tiles, strict=True)):
            # Weakly, so that the pages of a cache that is gone are freed.
            self._tiles = tuple(ref(tile) for tile in tiles)
            self._arenas = (_Arena * len(tiles))(*(_arena(tile) for tile in tiles))
        return self._arenas

    def _reach(self, paged: PagedPast) -> int:
        """A position that no attended token goes beyond, plus one."""
        if paged.pages is None:
            return paged.tokens
        return (int(paged.pages[:, -1].max()) + 1) * paged.page_tokens

    def _exact(self, exact: ExactPast, tokens: int) -> object:
        job, kept, parts = self.struct, [], []
        for keys, values in (*([exact.before] if exact.before else []), (exact.keys, exact.values)):
            if keys.dtype != torch.bfloat16:
                keys, values = keys.float(), values.float()
            keys, values = (side if side.stride(-1) == 1 else side.contiguous() for side in (keys, values))
            kept += [keys, values]
            parts.append(_Part(_side(keys), _side(values), keys.shape[2], int(keys.dtype == torch.bfloat16)))
        array = (_Part * len(parts))(*parts)
        job.part, job.parts = ctypes.addressof(array), len(parts)
        job.mask, job.mask_rows, mask = None, tokens, exact.mask
        if mask is not None:
            mask = mask.expand(exact.keys.shape[0], 1, tokens, sum(part.tokens for part in parts))
            job.mask, job.mask_batch_stride = mask.data_ptr(), mask.stride(0)
            job.mask_row_stride, job.mask_token_stride = mask.stride(2), mask.stride(3)
        return kept, array, mask

    def _queries(self, q: Tensor) -> list[Tensor]:
        """Queries in the order of pairs and padded, or folded into every reader's latents."""
        if self._pairs:
            assert self._rotary is not None
            if self._rotary.style == "interleaved":
                q = q[..., self._order]
            if self._rotary.attention_scale != 1.0:
                # Scales the rotated elements of keys; of queries, which is the same.
                q = torch.cat([q[..., : 2 * self._pairs] * self._rotary.attention_scale, q[..., 2 * self._pairs :]], -1)
            if self._width != self._head_dim:
                q = torch.nn.functional.pad(q, (0, self._width - self._head_dim))
            q = q.contiguous()
            for reader in self._keys:
                reader.query = q.data_ptr()
            return [q]
        made = []
        for index, reader in enumerate(self._key_readers):
            matrix, bias = self._folds[index]
            own, heads = pick(q, reader.heads), list(reader.heads)
            folded, constant = q.new_zeros(*q.shape[:3], reader.segment.latents), q.new_zeros(q.shape[:3])
            folded[:, heads] = own @ matrix
            constant[:, heads] = (own @ bias).squeeze(-1)
            self._keys[index].query, self._keys[index].constant = folded.data_ptr(), constant.data_ptr()
            made += [folded, constant]
        return made


def _pair_order(head_dim: int, pairs: int, paged: PagedPast) -> Tensor:
    """Elements of a head in the kernel's order: first of every rotated pair, second of every pair, the rest."""
    index = torch.arange(head_dim)
    if paged.rotary is None or paged.rotary.style == "half":
        return index
    return torch.cat([index[0 : 2 * pairs : 2], index[1 : 2 * pairs : 2], index[2 * pairs :]])


def _planes(segment: SegmentLayout) -> ctypes.Array[_Plane]:
    return (_Plane * len(segment.planes))(
        *(_Plane(p.bits, p.shift, p.start, p.stop - p.start, p.rows, p.offset) for p in segment.planes)
    )


def _arena(tile: Tensor) -> _Arena:
    return _Arena(tile.data_ptr(), tile.stride(0), tile.stride(1), tile.shape[1], tile.shape[2])


def _side(side: Tensor) -> _Side:
    return _Side(side.data_ptr(), side.stride(0), side.stride(1), side.stride(2))
