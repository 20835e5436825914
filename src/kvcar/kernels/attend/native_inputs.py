"""What the C kernel of attention is given: its structs filled in, and the tensors they point to."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from itertools import accumulate
from weakref import ref

import torch
from torch import Tensor

from ...layout import SegmentLayout
from ..native import native_library
from ..native.structs import NativePlane
from ..rotary import RotaryTable
from . import native_structs as structs
from .decode8 import decoder_in_8_bits, latent_bits
from .inputs import ExactPast, Held, PagedPast, Reader, pick


class NativeJob:
    """One layer's job: decoders in the kernel's order, made once, and pointers that every step sets anew.

    Args:
        paged: of the layer; its readers and rotation are what is prepared.
        head_dim: elements of a head.
        in_8_bits: whether decoders of keys are rounded to 8 bits where the CPU multiplies those faster.
    """

    def __init__(self, paged: PagedPast, head_dim: int, in_8_bits: bool = True) -> None:
        self._library = native_library()
        self._columns = int(self._library.kvcar_columns())
        self._latents_together = int(self._library.kvcar_decode8_latents())
        self._in_8_bits = in_8_bits and self._latents_together > 0
        self._key_readers, self._value_readers, self._rotary = paged.key_readers, paged.value_readers, paged.rotary
        self._head_dim, self._width = head_dim, self._rounded(head_dim)
        self._pairs = 0 if paged.rotary is None else paged.rotary.width // 2
        self._order = _pair_order(head_dim, self._pairs, paged)
        self._kept: list[object] = []  # what pointers point to
        self._folds: dict[int, tuple[Tensor, Tensor]] = {}
        self._plain_queries = self._pairs > 0 and self._width == head_dim and _is_plain(paged.rotary)
        # What the last step set. Weakly, so that a cache that is gone is freed.
        self._paged: ref[PagedPast] | None = None
        self._paged_kept: object = None
        self._held: tuple[ref[Tensor], ref[Tensor]] | None = None
        self._held_bases = (0, 0)
        self._sizes: tuple[int, ...] = ()
        self._places: list[int] = []
        self._scratch = 0
        self._tiles: tuple[ref[Tensor], ...] = ()
        self._arenas = (structs.Arena * 0)()
        self._parts = (structs.Part * 2)()
        self._part_places = tuple(ctypes.addressof(part) for part in self._parts)
        keys, values = paged.key_readers, paged.value_readers
        self._page_tokens = keys[0].segment.page_tokens
        self._keys = (structs.Reader * len(keys))(*(self._key_reader(i, r) for i, r in enumerate(keys)))
        self._values = (structs.Reader * len(values))(*(self._value_reader(r) for r in values))
        self.struct = structs.Job(
            head_dim=head_dim, page_tokens=self._page_tokens, pairs=self._pairs, key_readers=len(keys),
            value_readers=len(values), keys=ctypes.addressof(self._keys), values=ctypes.addressof(self._values),
        )  # fmt: skip
        self._reference = ctypes.byref(self.struct)

    def is_for(self, paged: PagedPast) -> bool:
        """Whether it was made for the readers and the rotation of ``paged``."""
        return (
            paged.key_readers is self._key_readers
            and paged.value_readers is self._value_readers
            and paged.rotary is self._rotary
        )

    def run(
        self, query: Tensor, exact: ExactPast, paged: PagedPast, scaling: float, softcap: float | None = None
    ) -> Tensor:
        """Attention of queries float32 ``[B, Hq, T, D]``, contiguous; the output likewise.

        Raises:
            MemoryError: none is left for the kernel's scratch.
        """
        batch, query_heads, tokens, _ = query.shape
        out, job = torch.empty_like(query), self.struct
        job.query, job.out, job.scaling, job.softcap = query.data_ptr(), out.data_ptr(), scaling, softcap or 0.0
        heads = exact.keys.shape[1]
        # Everything that is pointed to has a name here until the kernel is done.
        kept = (
            self._sized(batch, heads, query_heads // heads * tokens, paged.tokens),
            self._pages(paged),
            self._queries(query, heads),
            self._exact(exact, tokens),
        )
        if self._library.kvcar_attend(self._reference):
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

    def _reader(self, reader: Reader) -> structs.Reader:
        planes = _planes(reader.segment)
        heads = (ctypes.c_int32 * len(reader.heads))(*reader.heads)
        self._kept += [planes, heads]
        segment = reader.segment
        return structs.Reader(
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

    def _value_reader(self, reader: Reader) -> structs.Reader:
        native = self._reader(reader)
        matrix, bias = self._by_head(reader, torch.arange(self._head_dim))
        native.matrix, native.bias = self._keep(matrix), self._keep(bias)
        return native

    def _key_reader(self, index: int, reader: Reader) -> structs.Reader:
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

    def _round(self, native: structs.Reader, rounded: list[Tensor], stops: list[list[int]]) -> None:
        """Hand over decoders int8 ``[latents, padded D]`` of every head, latents that are multiplied together side by side."""
        stacked, together = torch.stack(rounded), self._latents_together
        stacked = torch.nn.functional.pad(stacked, (0, 0, 0, -stacked.shape[1] % together))
        native.narrow = self._keep(stacked.unflatten(1, (-1, together)).transpose(2, 3))
        native.stops_stride = 1 + max(map(len, stops))
        rows = [[len(own), *own, *[0] * (native.stops_stride - 1 - len(own))] for own in stops]
        native.stops = self._keep(torch.tensor(rows, dtype=torch.int32))

    # Set anew

    def _sized(self, batch: int, heads: int, rows: int, paged_tokens: int) -> Tensor:
        """Sizes of the step, and where in a scratch its sums go."""
        threads = torch.get_num_threads()
        # Two splits a thread even out threads of unequal speed; many sequences need none.
        splits = max(1, min(-(-paged_tokens // self._page_tokens), -(-2 * threads // batch)))
        sizes = (batch, heads, rows, splits, threads)
        if sizes != self._sizes:
            job = self.struct
            job.batch, job.heads, job.rows, job.splits, job.threads = self._sizes = sizes
            statistics, own = batch * (splits + 1) * heads * rows, batch * splits * rows
            sums = (own * native.heads * self._rounded(native.latents) for native in self._values)
            self._places = [0, *accumulate((statistics, statistics, *sums))]
            self._scratch = 0
        scratch = _scratch(self._places[-1])
        if scratch.data_ptr() != self._scratch:
            self._scratch = scratch.data_ptr()
            self.struct.most, self.struct.mass, *sums = (self._scratch + 4 * place for place in self._places[:-1])
            for native, place in zip(self._values, sums, strict=True):
                native.sums = place
        return scratch

    def _pages(self, paged: PagedPast) -> object:
        """Which pages of the past are attended to, and all that ``_set_past`` sets."""
        job, pages = self.struct, paged.pages
        # Of chosen pages all but the choice is the same from step to step.
        kept = self._past(paged if paged.whole is None else paged.whole)
        job.tokens, job.scattered = paged.tokens, paged.whole is not None
        if pages is None:
            job.page_index = None
            return kept
        pages = pages.contiguous()
        job.page_index = pages.data_ptr()
        return kept, pages

    def _past(self, paged: PagedPast) -> object:
        """What ``_set_past`` sets: set already, where ``paged`` is the same as in the step before."""
        if self._paged is None or self._paged() is not paged:
            self._paged_kept = self._set_past(paged)
            self._paged = ref(paged)
        return self._paged_kept

    def _set_past(self, paged: PagedPast) -> object:
        """Where tiles, first tokens and angles lie."""
        job = self.struct
        first, offset = paged.first.contiguous(), paged.offset.contiguous()
        job.first, job.offset = first.data_ptr(), offset.data_ptr()
        arenas = self._arenas_of(paged.tiles)
        job.arenas, job.arena = len(arenas), ctypes.addressof(arenas)
        if paged.rotary is None:
            return first, offset, arenas
        fine, coarse = paged.rotary.tables(self._reach(paged))
        job.fine_cos, job.fine_sin = fine[0].data_ptr(), fine[1].data_ptr()
        job.coarse_cos, job.coarse_sin = coarse[0].data_ptr(), coarse[1].data_ptr()
        return first, offset, arenas, fine, coarse

    def _arenas_of(self, tiles: Sequence[Tensor]) -> ctypes.Array[structs.Arena]:
        """Where the tiles lie; the same from step to step until one is added or replaced."""
        if len(tiles) != len(self._tiles) or any(own() is not t for own, t in zip(self._tiles, tiles, strict=True)):
            self._tiles = tuple(ref(tile) for tile in tiles)
            self._arenas = (structs.Arena * len(tiles))(*(_arena(tile) for tile in tiles))
        return self._arenas

    def _reach(self, paged: PagedPast) -> int:
        """A position that no attended token goes beyond, plus one."""
        if paged.pages is None:
            return paged.tokens
        # Gathered, tokens lie farther than the tiles reach.
        return (int(paged.pages[:, -1].max()) + 1) * paged.page_tokens

    def _exact(self, exact: ExactPast, tokens: int) -> object:
        """Tokens held exactly: the part held before, where there is one, and the part of this pass."""
        job, held = self.struct, exact.before
        keys, values = _readable(exact.keys), _readable(exact.values)
        _set_part(self._parts[1], keys, values)
        kept, first = [keys, values], 1
        if held is not None:
            kept += self._set_held(held)
            first = 0
        job.part, job.parts = self._part_places[first], 2 - first
        job.mask, mask = None, exact.mask
        if mask is not None:
            total = keys.shape[2] + (held.stop - held.start if held is not None else 0)
            mask = mask.expand(keys.shape[0], 1, tokens, total)
            job.mask, job.mask_rows, job.mask_batch_stride = mask.data_ptr(), tokens, mask.stride(0)
            job.mask_row_stride, job.mask_token_stride = mask.stride(2), mask.stride(3)
        return kept, mask

    def _set_held(self, held: Held) -> list[Tensor]:
        """Buffers that are the same as in the step before have their places already; only which tokens changes."""
        part, (keys, values, start, stop) = self._parts[0], held
        if self._held is None or self._held[0]() is not keys or self._held[1]() is not values:
            keys, values = _readable(keys), _readable(values)
            _set_part(part, keys, values)
            # Of copies there is nothing to come back to.
            same = keys is held.keys and values is held.values
            self._held = (ref(keys), ref(values)) if same else None
            self._held_bases = part.keys.base, part.values.base
        size = keys.element_size()
        part.keys.base = self._held_bases[0] + start * part.keys.token_stride * size
        part.values.base = self._held_bases[1] + start * part.values.token_stride * size
        part.tokens = stop - start
        return [keys, values]

    def _queries(self, query: Tensor, heads: int) -> list[Tensor]:
        """Queries in the order of pairs and padded, or folded into every reader's latents."""
        if self._plain_queries:
            place = self.struct.query
            for reader in self._keys:
                reader.query = place
            return []
        q = query.view(query.shape[0], heads, -1, query.shape[3])
        return self._turning(q) if self._pairs else self._folded(q)

    def _turning(self, q: Tensor) -> list[Tensor]:
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

    def _folded(self, q: Tensor) -> list[Tensor]:
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


_local = threading.local()


def _scratch(floats: int) -> Tensor:
    """Memory for sums, float32 of at least ``floats`` elements: of this thread, the same for all layers and models."""
    scratch = getattr(_local, "scratch", None)
    if scratch is None or len(scratch) < floats:
        scratch = _local.scratch = torch.empty(floats)
    return scratch


def _readable(side: Tensor) -> Tensor:
    """``side``, in a dtype that the kernel reads and with its elements side by side."""
    if side.dtype not in (torch.float32, torch.bfloat16):
        side = side.float()
    return side if side.stride(-1) == 1 else side.contiguous()


def _set_part(part: structs.Part, keys: Tensor, values: Tensor) -> None:
    for side, x in ((part.keys, keys), (part.values, values)):
        side.base = x.data_ptr()
        side.batch_stride, side.head_stride, side.token_stride, _ = x.stride()
    part.tokens, part.is_bfloat16 = keys.shape[2], int(keys.dtype == torch.bfloat16)


def _is_plain(rotary: RotaryTable | None) -> bool:
    """Whether queries go to the kernel as they are."""
    return rotary is not None and rotary.style == "half" and rotary.attention_scale == 1.0


def _pair_order(head_dim: int, pairs: int, paged: PagedPast) -> Tensor:
    """Elements of a head in the kernel's order: first of every rotated pair, second of every pair, the rest."""
    index = torch.arange(head_dim)
    if paged.rotary is None or paged.rotary.style == "half":
        return index
    return torch.cat([index[0 : 2 * pairs : 2], index[1 : 2 * pairs : 2], index[2 * pairs :]])


def _planes(segment: SegmentLayout) -> ctypes.Array[NativePlane]:
    return (NativePlane * len(segment.planes))(*map(NativePlane.of, segment.planes))


def _arena(tile: Tensor) -> structs.Arena:
    return structs.Arena(tile.data_ptr(), tile.stride(0), tile.stride(1), tile.shape[1], tile.shape[2])
