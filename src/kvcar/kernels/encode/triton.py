"""Encoding into pages with Triton: matrix product, quantiser and packing of the planes in one launch.

Encoders that are no single matrix in memory (the autoencoder, decoders in 8 bits with the metric) run in PyTorch, whose products
are the device's own library; quantiser and packing are then one launch.

Imported by the registry when the backend is asked for, as it needs the extra ``kvcar[triton]``. ``TRITON_INTERPRET=1``
in the environment, before Triton is first imported, runs the kernel on the CPU, slowly.
"""
# pyright: basic, reportOperatorIssue=false, reportArgumentType=false
# ruff: noqa: SIM102 - the outer condition is known when compiling, the inner one is not.
# No "from __future__ import annotations": Triton reads the annotations of jitted functions.

import weakref
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...errors import KernelError
from ..plane_table import PlaneTable, block_latents, joined, segment_fields
from ..triton_unpack import FIELDS, cannot_run_on
from .inputs import ENCODING, Writer, check_pages

_LONGEST_BLOCK = 64
_BLOCK_WIDTH = 32
_WARPS = 4
# Adding and subtracting 1.5 * 2**23 rounds a float32 below 2**22 to the nearest whole number, ties to even.
_ROUNDER = tl.constexpr(12582912.0)
_FLOAT16_MAXIMUM = tl.constexpr(65504.0)

_Tables = tuple[PlaneTable, Tensor]
_TABLES: weakref.WeakKeyDictionary[Writer, _Tables] = weakref.WeakKeyDictionary()


def unsupported(x: Tensor, writer: Writer) -> str | None:
    """Say why ``encode_pages`` cannot take these inputs, or None if it can."""
    reason = cannot_run_on(x.device.type)
    if reason is not None:
        return reason
    if writer.segment.lossless:
        return "the segment is lossless: there is nothing to encode"
    if writer.segment.branched < writer.segment.latents:
        return "codes have a trellis, which is searched in PyTorch"
    if writer.affine is None and writer.steps is None:
        return "scales are dynamic: they are computed from every token"
    return None


@ENCODING.register("triton", unsupported=unsupported)
def encode_pages(x: Tensor, writer: Writer) -> Tensor:
    """Compute the same as ``naive.encode_pages``, but for codes whose latent lies on the edge between two.

    Raises:
        KernelError: ``unsupported`` has a reason against these inputs.
        InputError: ``N`` is no multiple of the page's tokens.
    """
    reason = unsupported(x, writer)
    if reason is not None:
        raise KernelError(f"the Triton encoder cannot be used: {reason}; choose another backend")
    segment, pages = writer.segment, check_pages(x, writer)
    out = torch.empty(x.shape[0], pages, segment.size, dtype=torch.uint8, device=x.device)
    if out.numel():
        with torch.cuda.device_of(x):
            _launch(out, x.float(), writer)
    return out


def _launch(out: Tensor, x: Tensor, writer: Writer) -> None:
    table, highest = _tables(writer, x.device)
    step = writer.segment.page_tokens // 8
    grid = out.shape[1], table.blocks, out.shape[0]
    shape = {"STEP": step, "BLOCK_RHO": 1 << (step - 1).bit_length(), "BLOCK_R": table.block, "num_warps": _WARPS}
    if writer.affine is None:
        assert writer.encode is not None
        assert writer.steps is not None
        z, (scale, zero) = writer.encode(x).contiguous(), (part.contiguous() for part in writer.steps)
        quantize_block[grid](
            out, z, scale, zero, highest, table.fields, table.present, z.shape[2], table.latents, writer.segment.size,
            WIDTHS=table.widths, **shape,
        )  # fmt: skip
        return
    x = x if x.stride(-1) == 1 else x.contiguous()
    matrix, centre, scale, zero = (part.contiguous() for part in writer.affine)
    encode_block[grid](
        out, x, matrix, centre, scale, zero, highest, table.fields, table.present, x.shape[2], matrix.shape[1],
        table.latents, writer.segment.size, x.stride(0), x.stride(1), WIDTHS=table.widths, BLOCK_W=_BLOCK_WIDTH,
        PARTS=-(-x.shape[2] // _BLOCK_WIDTH), **shape,
    )  # fmt: skip


def _tables(writer: Writer, device: torch.device) -> _Tables:
    """Make planes, counted from the start of the segment, and the highest code float32 ``[R]`` of every latent."""
    if writer not in _TABLES:
        segment = replace(writer.segment, offset=0)
        block = block_latents([segment.latents], _LONGEST_BLOCK)
        table = joined([segment_fields(segment)], block, device)
        bits = torch.tensor(segment.level_bits(), dtype=torch.float32)
        _TABLES[writer] = table, (2**bits - 1).to(device)
    return _TABLES[writer]


@triton.jit
def _store_plane(
    out, code, table, latent, latents,
    KLASS: tl.constexpr, STEP: tl.constexpr, BLOCK_RHO: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Pack and write the plane of width ``2**KLASS`` of codes int32 ``[8 * BLOCK_RHO, BLOCK_R]``.

    Token ``place * rows + row`` of the page goes to byte ``row``; with ``rows = BITS * STEP`` and ``row = s * STEP +
    rho`` the codes' rows are (place, s, rho), and the places of a byte are summed.
    """
    BITS: tl.constexpr = 1 << KLASS
    field = table + KLASS * FIELDS * latents + latent
    offset = tl.load(field)
    stride = tl.load(field + latents)
    shift = tl.load(field + 2 * latents)
    part = (code >> shift[None, :]) & ((1 << BITS) - 1)
    part = tl.reshape(part, [8 // BITS, BITS * BLOCK_RHO, BLOCK_R])
    place = tl.arange(0, 8 // BITS)
    byte = tl.sum(part << (place * BITS)[:, None, None], 0)
    slot = tl.arange(0, BITS * BLOCK_RHO)
    within = slot % BLOCK_RHO
    row = (slot // BLOCK_RHO) * STEP + within
    mask = (within < STEP)[:, None] & (offset >= 0)[None, :]
    tl.store(out + row[:, None] * stride[None, :] + offset[None, :], byte.to(tl.uint8), mask=mask)


@triton.jit
def _store_codes(
    target, z, scale, zero, highest, table, present, block, inside, there, latent, column, latents,
    WIDTHS: tl.constexpr, STEP: tl.constexpr, BLOCK_RHO: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Quantise latents float32 ``[8 * BLOCK_RHO, BLOCK_R]`` of a page and write their planes to ``target``."""
    z -= tl.load(zero + latent, mask=column, other=0.0)[None, :]
    u = tl.div_rn(z, tl.broadcast_to(tl.load(scale + latent, mask=column, other=1.0)[None, :], z.shape))
    has = tl.load(present + block)
    limited = tl.minimum(tl.maximum(u, 0.0), tl.load(highest + latent, mask=column, other=0.0)[None, :])
    code = ((limited + _ROUNDER) - _ROUNDER).to(tl.int32)
    if WIDTHS & 8:
        if has & 8:
            _store_plane(target, code, table, latent, latents, 3, STEP, BLOCK_RHO, BLOCK_R)
    if WIDTHS & 4:
        if has & 4:
            _store_plane(target, code, table, latent, latents, 2, STEP, BLOCK_RHO, BLOCK_R)
    if WIDTHS & 2:
        if has & 2:
            _store_plane(target, code, table, latent, latents, 1, STEP, BLOCK_RHO, BLOCK_R)
    if WIDTHS & 1:
        if has & 1:
            _store_plane(target, code, table, latent, latents, 0, STEP, BLOCK_RHO, BLOCK_R)
    if WIDTHS & 16:
        if has & 16:
            field = table + 4 * FIELDS * latents + latent
            offset, stride = tl.load(field), tl.load(field + latents)
            raw = tl.minimum(tl.maximum(u, -_FLOAT16_MAXIMUM), _FLOAT16_MAXIMUM).to(tl.float16)
            where = target + inside[:, None] * stride[None, :] + offset[None, :]
            mask = there[:, None] & (offset >= 0)[None, :]
            tl.store(where.to(tl.pointer_type(tl.float16), bitcast=True), raw, mask=mask)


@triton.jit
def encode_block(
    out,
    x,
    matrix,
    centre,
    scale,
    zero,
    highest,
    table,
    present,
    width,
    columns,
    latents,
    size,
    batch_stride,
    token_stride,
    WIDTHS: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_RHO: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Encode one page's tokens into one block of latents, quantise, and pack their planes.

    A page's tokens are taken as (s, rho): token ``s * STEP + rho`` with 8 values of ``s``, ``STEP = page_tokens / 8``.
    ``STEP`` is padded to a power of two, so that planes of every width are sums over a leading axis for every page
    size.

    Args:
        out: uint8 ``[B, pages, size]``, written.
        x: float32 ``[B, pages * 8 * STEP, width]`` with strides, the last 1.
        matrix: float32 ``[width, columns]``; centre: float32 ``[width]``.
        scale, zero, highest: float32 ``[columns]``; ``highest`` is the highest code, unused for 16-bit latents.
        table, present, latents: of the ``PlaneTable``, offsets from the start of the segment.
    """
    page, block = tl.program_id(0), tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    token_slot = tl.arange(0, 8 * BLOCK_RHO)
    rho = token_slot % BLOCK_RHO
    inside = (token_slot // BLOCK_RHO) * STEP + rho
    there = rho < STEP
    latent = block * BLOCK_R + tl.arange(0, BLOCK_R)
    column = latent < columns

    own = x + batch * batch_stride + (page * (8 * STEP) + inside).to(tl.int64)[:, None] * token_stride
    z = tl.zeros([8 * BLOCK_RHO, BLOCK_R], tl.float32)
    for part in range(PARTS):
        w = part * BLOCK_W + tl.arange(0, BLOCK_W)
        inner = w < width
        piece = tl.load(own + w[None, :], mask=there[:, None] & inner[None, :], other=0.0)
        piece = tl.where(there[:, None], piece - tl.load(centre + w, mask=inner, other=0.0)[None, :], 0.0)
        encoder = tl.load(
            matrix + w[:, None] * columns + latent[None, :], mask=inner[:, None] & column[None, :], other=0.0
        )
        # Three tf32 products are as exact as float32: a code is a rounding away from its neighbour.
        z = tl.dot(piece, encoder, z, input_precision="tf32x3")

    target = out + (batch * tl.num_programs(0) + page) * size
    _store_codes(
        target, z, scale, zero, highest, table, present, block, inside, there, latent, column, latents, WIDTHS, STEP, BLOCK_RHO, BLOCK_R
    )  # fmt: skip


@triton.jit
def quantize_block(
    out, z, scale, zero, highest, table, present, columns, latents, size,
    WIDTHS: tl.constexpr, STEP: tl.constexpr, BLOCK_RHO: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Quantise latents ``z`` float32 ``[B, pages * 8 * STEP, columns]`` and pack their planes; as ``encode_block`` otherwise."""
    page, block = tl.program_id(0), tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    token_slot = tl.arange(0, 8 * BLOCK_RHO)
    rho = token_slot % BLOCK_RHO
    inside = (token_slot // BLOCK_RHO) * STEP + rho
    there = rho < STEP
    latent = block * BLOCK_R + tl.arange(0, BLOCK_R)
    column = latent < columns
    token = (batch * tl.num_programs(0) + page) * (8 * STEP) + inside
    own = tl.load(z + token[:, None] * columns + latent[None, :], mask=there[:, None] & column[None, :], other=0.0)
    target = out + (batch * tl.num_programs(0) + page) * size
    _store_codes(
        target, own, scale, zero, highest, table, present, block, inside, there, latent, column, latents, WIDTHS, STEP, BLOCK_RHO, BLOCK_R
    )  # fmt: skip
