"""Packing in PyTorch by shifts and masks of whole planes: any device, any number of pages at once."""

from __future__ import annotations

import torch
from torch import Tensor

from ...layout import Plane, SegmentLayout
from ..backend import Operation
from ..trellis import changes_of, with_branches

PACKING = Operation("packing", __package__ or "")
UNPACKING = Operation("unpacking", __package__ or "")


@PACKING.register("torch")
def pack(u: Tensor, layout: SegmentLayout) -> Tensor:
    """Pack stored values ``u`` float32 ``[..., page_tokens, R]`` into bytes uint8 ``[..., size]``."""
    lead = u.shape[:-2]
    parts = []
    if layout.raw:
        parts.append(raw_bytes(u, layout))
    if layout.planes:
        codes = with_branches(u[..., layout.raw :].to(torch.uint8), layout.branched - layout.raw)
        parts += [_pack_plane(codes, plane, layout.raw).reshape(*lead, -1) for plane in layout.planes]
    return torch.cat(parts, dim=-1)


@UNPACKING.register("torch")
def unpack(data: Tensor, layout: SegmentLayout) -> Tensor:
    """Unpack stored values float32 ``[..., page_tokens, R]`` of bytes ``[..., size]``; ``data`` may be strided."""
    lead = data.shape[:-1]
    u = torch.empty(*lead, layout.page_tokens, layout.latents, device=data.device, dtype=torch.float32)
    if layout.raw:
        u[..., : layout.raw] = raw_values(data, layout)
    if layout.planes:
        shape = (*lead, layout.page_tokens, layout.latents - layout.raw)
        codes = torch.empty(shape, dtype=torch.uint8, device=data.device)
        for plane in layout.planes:
            _unpack_plane(data, plane, layout.raw, codes)
        first = layout.branched - layout.raw
        codes[..., first:] ^= changes_of(codes[..., first:] >> 1 & 1)
        u[..., layout.raw :] = codes
    return u


def raw_bytes(u: Tensor, layout: SegmentLayout) -> Tensor:
    """Take the bytes uint8 ``[..., n]`` of the raw latents of ``u`` ``[..., page_tokens, R]``."""
    raw = u[..., : layout.raw].to(torch.float16).contiguous()
    return raw.view(torch.uint8).reshape(*u.shape[:-2], -1)


def raw_values(data: Tensor, layout: SegmentLayout) -> Tensor:
    """Take the raw latents float16 ``[..., page_tokens, raw]`` of bytes ``[..., size]``."""
    raw = data[..., : layout.raw * layout.page_tokens * 2].contiguous().view(torch.float16)
    return raw.view(*data.shape[:-1], layout.page_tokens, layout.raw)


def _pack_plane(codes: Tensor, plane: Plane, raw: int) -> Tensor:
    part = codes[..., plane.start - raw : plane.stop - raw]
    part = (part >> plane.shift) & (2**plane.bits - 1)
    packed = part[..., : plane.rows, :].clone()
    for place in range(1, 8 // plane.bits):
        packed |= part[..., place * plane.rows : (place + 1) * plane.rows, :] << (place * plane.bits)
    return packed


def _unpack_plane(data: Tensor, plane: Plane, raw: int, codes: Tensor) -> None:
    """Write or, where another plane did, add the plane's bits into ``codes`` uint8 ``[..., page_tokens, R - raw]``.

    Bytes are shifted four at a time as int32: what crosses a byte's border is masked off. A plane's size is a
    multiple of 4 bytes because a page is a multiple of 32 tokens.
    """
    lead, width = data.shape[:-1], plane.stop - plane.start
    packed = data[..., plane.offset : plane.offset + plane.size].contiguous().view(torch.int32)
    mask = (2**plane.bits - 1) * 0x01010101
    target = codes[..., plane.start - raw : plane.stop - raw]
    for place in range(8 // plane.bits):
        part = packed >> (place * plane.bits) if place else packed
        if plane.bits < 8:
            part = part & mask
        tokens = target[..., place * plane.rows : (place + 1) * plane.rows, :]
        if plane.shift > plane.trellis:
            tokens |= (part << plane.shift).view(torch.uint8).view(*lead, plane.rows, width)
        else:
            tokens.copy_((part << plane.shift).view(torch.uint8).view(*lead, plane.rows, width))
