"""A segment's planes as a table that a kernel can read: for every latent, where its bits lie in a page.

The planes of a latent of 1 to 8 bits are its binary digits: it has at most one plane of each width 8, 4, 2 and 1.
So five classes describe any mix of bits: one for each plane width, and one for elements stored as they are (16-bit
latents, or lossless slots), which count as width 16. In a class a latent has the fields

- ``offset``: bytes from the start of the page to its column, -1 where it has nothing in this class;
- ``stride``: bytes from a row of the plane to the next, or from a token's element to the next token's;
- ``shift``: where the plane's bits go in the code;
- ``trellis``: 1 where the plane's lowest bits are branches (see ``trellis``).

Then ``code(token) = sum over classes of ((byte[offset + row * stride] >> (width * place)) & mask) << shift`` with
``rows = page_tokens * width / 8``, ``row = token % rows`` and ``place = token // rows``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..layout import SegmentLayout

WIDTHS = (1, 2, 4, 8, 16)
BRANCHES = 32
_FIELDS = 4
_ELEMENT = WIDTHS.index(16)
_RAW_BYTES = 2
_WORD = 4


@dataclass(frozen=True)
class PlaneTable:
    """Latents of one or several segments in blocks of equal length, so that a kernel takes a block at a time.

    Attributes:
        fields: int32 ``[5, 4, blocks * block]``: class, field, latent.
        present: int32 ``[blocks]``: the sum of the widths that any latent of the block has.
        widths: the sum of the widths that any latent has, and ``BRANCHES`` where any plane has branches.
        blocks: blocks of each segment, the same number for all.
        block: latents of a block.
    """

    fields: Tensor
    present: Tensor
    widths: int
    blocks: int
    block: int

    @property
    def latents(self) -> int:
        """Latents of all blocks, padding counted."""
        return self.fields.shape[-1]


def segment_fields(segment: SegmentLayout, element_bytes: int = _RAW_BYTES) -> Tensor:
    """Make fields int32 ``[5, 4, latents]`` of a segment; ``element_bytes`` are those of a lossless one's elements."""
    fields = _absent(segment.latents)
    elements = segment.latents if segment.lossless else segment.raw
    size = element_bytes if segment.lossless else _RAW_BYTES
    fields[_ELEMENT, 0, :elements] = segment.offset + torch.arange(elements, dtype=torch.int32) * size
    fields[_ELEMENT, 1, :elements] = elements * size
    for plane in segment.planes:
        own = fields[WIDTHS.index(plane.bits), :, plane.start : plane.stop]
        width = plane.stop - plane.start
        own[0] = segment.offset + plane.offset + torch.arange(width, dtype=torch.int32)
        own[1], own[2], own[3] = width, plane.shift, int(plane.trellis)
    return fields


def word_slots(segment: SegmentLayout) -> Tensor:
    """Assign slots int64 ``[latents]`` to a coded segment's latents; every four slots have latents of the same planes.

    So four latents can be read as a word. They stand there in the order 0, 2, 1, 3, as ``triton_unpack.py`` puts them.
    """
    edges = sorted({0, segment.raw, segment.latents, *(edge for plane in segment.planes for edge in plane[2:4])})
    order, slots = torch.tensor([0, 2, 1, 3]), []
    start = 0
    for first, stop in pairwise(edges):
        index = torch.arange(stop - first)
        slots.append(start + index // _WORD * _WORD + order[index % _WORD])
        start += -(-(stop - first) // _WORD) * _WORD
    return torch.cat(slots)


def spread(fields: Tensor, slots: Tensor) -> Tensor:
    """Put fields of latents ``[..., latents]`` in their slots, whole words of them; nothing in between."""
    out = _absent(-(-(int(slots.max()) + 1) // _WORD) * _WORD)
    out[..., slots] = fields
    return out


def word_fields(fields: Tensor) -> Tensor:
    """Make fields int32 ``[4, 5, slots / 4]`` of words from those of latents in their slots, for the four plane widths.

    They are the offset of the first latent's byte, the stride, the shift, by how many bytes the last latent's lies
    behind the first's, and the bits that the class has in the word. Where a word has nothing in a class it reads the
    page's first bytes, and keeps no bits.
    """
    parts = fields[:_ELEMENT].unflatten(-1, (-1, _WORD))
    offset, stride, shift, _ = parts[..., 0].unbind(1)
    there = offset >= 0
    span = (parts[:, 0] >= 0).sum(-1) - 1
    width = torch.tensor(WIDTHS[:_ELEMENT])[:, None]
    mask = ((2**width - 1) << shift.long()) * 0x01010101
    mask = torch.where(mask >= 2**31, mask - 2**32, mask)
    return torch.stack([offset, stride, shift, span, mask], dim=1).where(there[:, None], 0).to(torch.int32).contiguous()


def has_elements(fields: Tensor) -> bool:
    """Whether any latent is stored as it is."""
    return bool((fields[_ELEMENT, 0] >= 0).any())


def has_branches(fields: Tensor) -> bool:
    """Whether any plane has branches."""
    return bool(fields[:, 3].any())


def highest_codes(fields: Tensor) -> Tensor:
    """Find the highest code float32 ``[latents]`` that the planes of each latent have room for."""
    width = torch.tensor(WIDTHS[:_ELEMENT])[:, None]
    there, shift, trellis = fields[:_ELEMENT, 0] >= 0, fields[:_ELEMENT, 2].long(), fields[:_ELEMENT, 3].long()
    return torch.where(there, ((2**width - 1) << shift) + trellis, 0).sum(0).float()


def block_latents(counts: Sequence[int], longest: int) -> int:
    """Choose the length of a block, a power of two of 16 to ``longest``, for segments of so many latents."""
    return max(16, min(longest, 1 << (max(counts) - 1).bit_length()))


def joined(parts: Sequence[Tensor], block: int, device: torch.device) -> PlaneTable:
    """Join several segments' fields, each filled up to the same number of blocks with latents that have no bits."""
    blocks = max(-(-fields.shape[-1] // block) for fields in parts)
    filled = [torch.cat([fields, _absent(blocks * block - fields.shape[-1])], dim=-1) for fields in parts]
    fields = torch.cat(filled, dim=-1)
    has = (fields[:, 0] >= 0).unflatten(-1, (-1, block)).any(-1)
    present = (has * torch.tensor(WIDTHS)[:, None]).sum(0).to(torch.int32)
    widths = sum(width for width, there in zip(WIDTHS, has.any(-1).tolist(), strict=True) if there)
    widths += BRANCHES * int(has_branches(fields))
    return PlaneTable(fields.contiguous().to(device), present.to(device), widths, blocks, block)


def _absent(latents: int) -> Tensor:
    fields = torch.zeros(len(WIDTHS), _FIELDS, latents, dtype=torch.int32)
    fields[:, 0] = -1
    return fields
