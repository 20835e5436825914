"""Decode attention over pages in compiled C, for CPUs: one pass over the packed bytes, split among torch's threads.

For steps, passes of few query tokens. A tile's keys are decoded once for all query heads that share them, rotated and
scored while they are in cache; values are summed as latents. Keys of models without rotary positions are never decoded.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from weakref import ref

import torch
from torch import Tensor

from ...errors import KernelError
from ..native import native_library
from .cpu_decoders import NativeDecoders
from .inputs import ATTENTION, READ_TABLES, Buffered, ExactPast, PagedPast, Reader

# Products in integers double the speed of what takes longest; see cpu_decoders.py.
IN_8_BITS = True
_JOB = "C job"
_KINDS = (torch.float32, torch.bfloat16, torch.float16)  # ``ExactKind`` of ``attend.c``
_I32, _I64, _POINTER, _F32 = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p, ctypes.c_float


def unsupported(query: Tensor, paged: PagedPast) -> str | None:
    """Say why ``attend`` cannot take these inputs, or None if it can."""
    if query.device.type != "cpu":
        return f"the query is on {query.device.type}"
    reasons = map(_unsupported_reader, (*paged.key_readers, *paged.value_readers))
    return next((reason for reason in reasons if reason is not None), None)


def _unsupported_reader(reader: Reader) -> str | None:
    if not reader.affine_in_codes:
        return "a codec is not affine in its codes"
    return "latents of 16 bits" if reader.segment.raw else None


@ATTENTION.register("cpu", "step", unsupported=unsupported)
def attend(
    query: Tensor,
    exact: ExactPast,
    paged: PagedPast,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Compute the same as ``naive.attend``; pages, sinks and window are read where they lie.

    Raises:
        KernelError: ``unsupported`` has a reason against these inputs, or the kernels cannot be compiled.
    """
    out = _job(paged, query).run(query.float().contiguous(), exact, paged, scaling, softcap, sinks)
    return out.to(query.dtype)


READ_TABLES.add(attend)


def _job(paged: PagedPast, query: Tensor) -> NativeJob:
    """Return what stays the same from step to step, made once for a layer."""
    kept = paged.key_readers[0].kept
    job = kept.get(_JOB)
    if not isinstance(job, NativeJob) or not job.is_for(paged):
        reason = unsupported(query, paged)
        if reason is not None:
            raise KernelError(f"the C kernel of attention cannot be used: {reason}; choose another backend")
        job = kept[_JOB] = NativeJob(paged, query.shape[3], IN_8_BITS)
    return job


class _Arena(ctypes.Structure):
    """``Arena`` of ``attend.c``: a run of pages."""

    _fields_ = [("base", _POINTER), *((name, _I64) for name in ("batch_stride", "page_stride", "pages", "page_bytes"))]


class _Side(ctypes.Structure):
    """``Side`` of ``attend.c``: keys or values kept exactly, by strides in elements."""

    _fields_ = [("base", _POINTER), ("batch_stride", _I64), ("head_stride", _I64), ("token_stride", _I64)]


class _Part(ctypes.Structure):
    """``Part`` of ``attend.c``: tokens kept exactly."""

    _fields_ = [("keys", _Side), ("values", _Side), ("tokens", _I64), ("kind", _I32), ("spare", _I32)]


class _Job(ctypes.Structure):
    """``Job`` of ``attend.c``: everything of one call."""

    _fields_ = [
        *((name, _I32) for name in ("batch", "heads", "rows", "head_dim", "page_tokens", "pairs", "splits", "threads")),
        ("tokens", _I64), ("positions", _I64), ("first", _POINTER), ("offset", _POINTER), ("shown", _POINTER), ("shown_stride", _I64),
        ("fine_cos", _POINTER), ("fine_sin", _POINTER), ("coarse_cos", _POINTER), ("coarse_sin", _POINTER),
        ("scaling", _F32), ("softcap", _F32),
        *((name, _I32) for name in ("segments", "key_readers", "value_readers", "arenas")),
        *((name, _POINTER) for name in ("segment", "keys", "values", "arena", "scratch", "query", "part", "mask")),
        ("mask_batch_stride", _I64), ("mask_row_stride", _I64), ("mask_token_stride", _I64),
        *((name, _I32) for name in ("mask_rows", "parts", "sums_in_8_bits", "spare")),
        *((name, _POINTER) for name in ("out", "maximum", "mass", "rooms")), ("room", _I64), ("sinks", _POINTER),
        ("table", _POINTER), ("table_stride", _I64),
    ]  # fmt: skip


class NativeJob:
    """One layer's job: decoders in the kernel's order, made once, and pointers that every step sets anew.

    Args:
        paged: of the layer; its readers and rotation are prepared.
        head_dim: elements of a head.
        in_8_bits: whether decoders are rounded to 8 bits and values summed in integers.
    """

    def __init__(self, paged: PagedPast, head_dim: int, in_8_bits: bool = True) -> None:
        self._library = native_library()
        self._library.kvcar_scratch.restype = _I64
        self._key_readers, self._value_readers, self._rotary = paged.key_readers, paged.value_readers, paged.rotary
        self._decoders = NativeDecoders(paged, head_dim, in_8_bits)
        self._page_tokens = paged.page_tokens
        # Of the last step. Weakly, so that a cache that is gone is freed.
        self._paged: ref[PagedPast] | None = None
        self._paged_kept: object = None
        self._buffers: tuple[ref[Tensor], ref[Tensor]] | None = None
        self._buffer_bases = (0, 0)
        self._sizes: tuple[int, ...] = ()
        self._scratch_floats = 0
        self._tiles: tuple[ref[Tensor], ...] = ()
        self._arenas = (_Arena * 0)()
        self._parts = (_Part * 2)()
        self._part_places = tuple(ctypes.addressof(part) for part in self._parts)
        segments, keys, values = self._decoders.segments, self._decoders.keys, self._decoders.values
        self._struct = _Job(
            head_dim=head_dim, page_tokens=self._page_tokens, pairs=self._decoders.pairs, segments=len(segments),
            key_readers=len(keys), value_readers=len(values), segment=ctypes.addressof(segments),
            keys=ctypes.addressof(keys), values=ctypes.addressof(values), sums_in_8_bits=int(in_8_bits),
        )  # fmt: skip
        self._reference = ctypes.byref(self._struct)
        # One struct for all threads that run a model: one of them at a time fills it in and uses it.
        self._lock = threading.Lock()

    def tensors(self) -> list[Tensor]:
        """See ``KeepsTensors``."""
        return self._decoders.tensors()

    def is_for(self, paged: PagedPast) -> bool:
        """Whether it was made for the readers and the rotation of ``paged``."""
        return (
            paged.key_readers is self._key_readers
            and paged.value_readers is self._value_readers
            and paged.rotary is self._rotary
        )

    def run(
        self,
        query: Tensor,
        exact: ExactPast,
        paged: PagedPast,
        scaling: float,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Attend with queries float32 ``[B, Hq, T, D]``, contiguous; the output likewise.

        Raises:
            MemoryError: none is left for the kernel's scratch.
        """
        with self._lock:
            return self._run(query, exact, paged, scaling, softcap, sinks)

    def _run(
        self,
        query: Tensor,
        exact: ExactPast,
        paged: PagedPast,
        scaling: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        batch, query_heads, tokens, _ = query.shape
        out, job = torch.empty_like(query), self._struct
        job.query, job.out, job.scaling, job.softcap = query.data_ptr(), out.data_ptr(), scaling, softcap or 0.0
        heads = exact.keys.shape[1]
        # Everything that is pointed to has a name here until the kernel is done.
        kept = (
            self._set_sizes(batch, heads, query_heads // heads * tokens, paged.tokens),
            self._set_past(paged),
            self._decoders.set_queries(query, heads),
            self._set_exact(exact, tokens),
            self._set_sinks(sinks, tokens),
        )
        if self._library.kvcar_attend(self._reference):
            raise MemoryError("no memory for the scratch of attention over pages")
        del kept
        return out

    def _set_sizes(self, batch: int, heads: int, rows: int, paged_tokens: int) -> Tensor:
        """Set the sizes of the step and its scratch."""
        threads = torch.get_num_threads()
        # Two splits a thread even out threads of unequal speed; many sequences need none.
        splits = max(1, min(-(-paged_tokens // self._page_tokens), -(-2 * threads // batch)))
        sizes, job = (batch, heads, rows, splits, threads), self._struct
        if sizes != self._sizes:
            job.batch, job.heads, job.rows, job.splits, job.threads = self._sizes = sizes
            self._scratch_floats = int(self._library.kvcar_scratch(self._reference))
        scratch = _scratch(self._scratch_floats)
        job.scratch = scratch.data_ptr()
        return scratch

    def _set_past(self, paged: PagedPast) -> object:
        """Set where tiles, first tokens and angles lie, unless ``paged`` is the same as in the step before."""
        if self._paged is None or self._paged() is not paged:
            self._paged_kept = self._set_pages(paged)
            self._paged = ref(paged)
        return self._paged_kept

    def _set_pages(self, paged: PagedPast) -> object:
        job = self._struct
        first, offset = paged.first.contiguous(), paged.offset.contiguous()
        job.tokens, job.first, job.offset = paged.tokens, first.data_ptr(), offset.data_ptr()
        shown = None if paged.shown is None else paged.shown.contiguous()
        job.shown, job.shown_stride = (None, 0) if shown is None else (shown.data_ptr(), shown.shape[1])
        table = None if paged.table is None else paged.table.contiguous()
        job.table, job.table_stride = (None, 0) if table is None else (table.data_ptr(), table.shape[1])
        arenas = self._arenas_of(paged.tiles)
        job.arenas, job.arena = len(arenas), ctypes.addressof(arenas)
        if paged.rotary is None:
            return first, offset, shown, table, arenas
        fine, coarse = paged.rotary.tables(paged.positions)
        job.positions = len(fine[0]) * len(coarse[0])
        job.fine_cos, job.fine_sin = fine[0].data_ptr(), fine[1].data_ptr()
        job.coarse_cos, job.coarse_sin = coarse[0].data_ptr(), coarse[1].data_ptr()
        return first, offset, shown, table, arenas, fine, coarse

    def _arenas_of(self, tiles: Sequence[Tensor]) -> ctypes.Array[_Arena]:
        """Return where the tiles lie; the same from step to step until one is added or replaced."""
        if len(tiles) != len(self._tiles) or any(own() is not t for own, t in zip(self._tiles, tiles, strict=True)):
            self._tiles = tuple(ref(tile) for tile in tiles)
            self._arenas = (_Arena * len(tiles))(*(_arena(tile) for tile in tiles))
        return self._arenas

    def _set_exact(self, exact: ExactPast, tokens: int) -> object:
        """Set the tokens kept exactly: the buffered part, where there is one, and the part of this pass."""
        job, before = self._struct, exact.before
        keys, values = _readable(exact.keys), _readable(exact.values)
        _set_part(self._parts[1], keys, values)
        kept, first = [keys, values], 1
        if before is not None:
            kept += self._set_buffered(before)
            first = 0
        job.part, job.parts = self._part_places[first], 2 - first
        job.mask, mask = None, exact.mask
        if mask is not None:
            total = keys.shape[2] + (before.stop - before.start if before is not None else 0)
            mask = mask.expand(keys.shape[0], 1, tokens, total)
            job.mask, job.mask_rows, job.mask_batch_stride = mask.data_ptr(), tokens, mask.stride(0)
            job.mask_row_stride, job.mask_token_stride = mask.stride(2), mask.stride(3)
        return kept, mask

    def _set_sinks(self, sinks: Tensor | None, tokens: int) -> Tensor | None:
        """Set the scores ``[Hq]`` that no value belongs to, for every query row."""
        rows = None if sinks is None else sinks.float().repeat_interleave(tokens).contiguous()
        self._struct.sinks = None if rows is None else rows.data_ptr()
        return rows

    def _set_buffered(self, buffered: Buffered) -> list[Tensor]:
        """Set which tokens are read; buffers that are the same as in the step before have their places already."""
        part, (keys, values, start, stop) = self._parts[0], buffered
        if self._buffers is None or self._buffers[0]() is not keys or self._buffers[1]() is not values:
            keys, values = _readable(keys), _readable(values)
            _set_part(part, keys, values)
            # Of copies there is nothing to come back to.
            same = keys is buffered.keys and values is buffered.values
            self._buffers = (ref(keys), ref(values)) if same else None
            self._buffer_bases = part.keys.base, part.values.base
        size = keys.element_size()
        part.keys.base = self._buffer_bases[0] + start * part.keys.token_stride * size
        part.values.base = self._buffer_bases[1] + start * part.values.token_stride * size
        part.tokens = stop - start
        return [keys, values]


_local = threading.local()


def _scratch(floats: int) -> Tensor:
    """Return this thread's memory for a step, float32 of at least ``floats`` elements, the same for all layers."""
    scratch = getattr(_local, "scratch", None)
    if scratch is None or len(scratch) < floats:
        scratch = _local.scratch = torch.empty(floats, dtype=torch.float32)
    return scratch


def _readable(side: Tensor) -> Tensor:
    """Return ``side`` in a dtype that the kernel reads and with its elements side by side."""
    if side.dtype not in _KINDS:
        side = side.float()
    return side if side.stride(-1) == 1 else side.contiguous()


def _set_part(part: _Part, keys: Tensor, values: Tensor) -> None:
    for side, x in ((part.keys, keys), (part.values, values)):
        side.base = x.data_ptr()
        side.batch_stride, side.head_stride, side.token_stride, _ = x.stride()
    part.tokens, part.kind = keys.shape[2], _KINDS.index(keys.dtype)


def _arena(tile: Tensor) -> _Arena:
    return _Arena(tile.data_ptr(), tile.stride(0), tile.stride(1), tile.shape[1], tile.shape[2])
