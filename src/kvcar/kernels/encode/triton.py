"""Encoding into pages with Triton: matrix product, quantiser and packing of the planes in one launch.

Used where ``kernels.backend`` says so and ``serves`` has nothing against it; nothing else imports it. It needs the extra
``kvcar[triton]``. ``TRITON_INTERPRET=1`` in the environment, before Triton is first imported, runs the kernel on
the CPU, slowly.
"""

from __future__ import annotations

import weakref
from dataclasses import replace

import torch
from torch import Tensor

from ...errors import KernelError
from ..plane_table import PlaneTable, block_latents, joined, segment_fields
from ..triton_planes import cannot_run_on
from .inputs import Writer, check_pages
from .triton_kernels import encode_pages as _kernel

_MOST_BLOCK_LATENTS = 64
_BLOCK_WIDTH = 32
_WARPS = 4

_Tables = tuple[PlaneTable, Tensor]
_TABLES: weakref.WeakKeyDictionary[Writer, _Tables] = weakref.WeakKeyDictionary()


def serves(x: Tensor, writer: Writer) -> str | None:
    """Why ``encode_pages`` cannot take these inputs, or None if it can."""
    reason = cannot_run_on(x.device.type)
    if reason is not None:
        return reason
    if writer.segment.lossless:
        return "the segment is lossless: there is nothing to encode"
    if writer.affine is None:
        return "the encoder is not affine or its scales are dynamic"
    return None


def encode_pages(x: Tensor, writer: Writer) -> Tensor:
    """Same as ``naive.encode_pages``, but for codes whose latent lies on the edge between two.

    Raises:
        KernelError: ``serves`` has a reason against these inputs.
        InputError: ``N`` is no multiple of the page's tokens.
    """
    reason = serves(x, writer)
    if reason is not None or writer.affine is None:
        raise KernelError(f"the Triton encoder cannot be used: {reason}; choose another backend")
    segment, pages = writer.segment, check_pages(x, writer)
    x = x.float() if x.stride(-1) == 1 else x.float().contiguous()
    table, most = _tables(writer)
    matrix, centre, scale, zero = (part.contiguous() for part in writer.affine)
    step = segment.page_tokens // 8
    out = torch.empty(x.shape[0], pages, segment.size, dtype=torch.uint8, device=x.device)
    if not out.numel():
        return out
    with torch.cuda.device_of(x):
        _kernel[(pages, table.blocks, x.shape[0])](
            out, x, matrix, centre, scale, zero, most, table.fields, table.present, x.shape[2], matrix.shape[1],
            table.latents, segment.size, x.stride(0), x.stride(1), WIDTHS=table.widths, STEP=step,
            BLOCK_RHO=1 << (step - 1).bit_length(), BLOCK_W=_BLOCK_WIDTH, BLOCK_R=table.block,
            PARTS=-(-x.shape[2] // _BLOCK_WIDTH), num_warps=_WARPS,  # pyright: ignore[reportCallIssue]
        )  # fmt: skip
    return out


def _tables(writer: Writer) -> _Tables:
    """Planes, counted from the start of the segment, and the highest code float32 ``[R]`` of every latent."""
    if writer not in _TABLES:
        assert writer.affine is not None
        segment = replace(writer.segment, offset=0)
        block = block_latents([segment.latents], _MOST_BLOCK_LATENTS)
        table = joined([segment_fields(segment)], block, writer.affine.matrix.device)
        bits = torch.zeros(segment.latents)
        for plane in segment.planes:
            bits[plane.start : plane.stop] += plane.bits
        _TABLES[writer] = table, (2**bits - 1).to(writer.affine.matrix.device)
    return _TABLES[writer]
