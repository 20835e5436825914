"""The specification of packing: one bit at a time, straight from the words of ``docs/format.md``."""

from __future__ import annotations

import torch
from torch import Tensor

from ...layout import SegmentLayout


def pack(u: Tensor, layout: SegmentLayout) -> Tensor:
    """Pack the stored values ``u`` float32 ``[page_tokens, R]`` of one page into bytes uint8 ``[size]``."""
    out = torch.zeros(layout.size, dtype=torch.uint8)
    if layout.raw:
        raw = u[:, : layout.raw].to(torch.float16).contiguous()
        out[: raw.numel() * 2] = raw.view(torch.uint8).reshape(-1)
    branches = _branches(u)
    for plane in layout.planes:
        width = plane.stop - plane.start
        for token in range(layout.page_tokens):
            row, place = token % plane.rows, token // plane.rows
            for latent in range(plane.start, plane.stop):
                part = (int(u[token, latent]) >> plane.shift) & (2**plane.bits - 1)
                if plane.trellis:
                    part = part & ~1 | branches[token][latent]
                index = plane.offset + row * width + latent - plane.start
                out[index] |= part << (place * plane.bits)
    return out


def unpack(data: Tensor, layout: SegmentLayout) -> Tensor:
    """Unpack stored values float32 ``[page_tokens, R]`` of the bytes ``[size]`` of one page."""
    u = torch.zeros(layout.page_tokens, layout.latents, dtype=torch.float32)
    if layout.raw:
        raw = data[: layout.raw * layout.page_tokens * 2].clone().view(torch.float16)
        u[:, : layout.raw] = raw.view(layout.page_tokens, layout.raw).float()
    for plane in layout.planes:
        width = plane.stop - plane.start
        for token in range(layout.page_tokens):
            row, place = token % plane.rows, token // plane.rows
            for latent in range(plane.start, plane.stop):
                byte = int(data[plane.offset + row * width + latent - plane.start])
                part = (byte >> (place * plane.bits)) & (2**plane.bits - 1)
                u[token, latent] += part << plane.shift
        if plane.trellis:
            columns = slice(plane.start, plane.stop)
            levels = u[:, columns].long()
            u[:, columns] = levels.bitwise_xor(_below(levels >> 1 & 1)).float()
    return u


def _branches(u: Tensor) -> list[list[int]]:
    """Of levels ``[T, R]``: ``x[t] = level[t] >> 1 ^ x[t-1] ^ x[t-3]``, in their lowest bit."""
    found: list[list[int]] = []
    for token, levels in enumerate(u.tolist()):
        one, three = (found[token - back] if token >= back else [0] * len(levels) for back in (1, 3))
        found.append([(int(level) >> 1 ^ a ^ b) & 1 for level, a, b in zip(levels, one, three, strict=True)])
    return found


def _below(x: Tensor) -> Tensor:
    """What branches int64 ``[T, n]`` change in levels that have them for their second bits."""
    changes = torch.zeros_like(x)
    for back, bit in ((1, 1), (2, 0), (3, 1)):
        changes[back:] ^= x[:-back] << bit
    return changes
