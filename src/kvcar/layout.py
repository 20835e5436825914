"""Lay out a page, bit by bit. ``docs/format.md`` describes the same thing in words.

A page has ``page_tokens`` tokens of everything a cache stores packed. It is a row of segments, one per unit (a
block, or the exact slots of a mixed layer), each starting at a multiple of 16 bytes. A segment is a row of planes. A
plane has ``bits`` bits of a range of latents: byte ``[row, latent]`` packs the tokens ``row``, ``row + rows``, ...
with the first in the lowest bits, ``rows = page_tokens * bits / 8``. Packing along tokens needs no padding of latents
and unpacks with a shift and a mask, without a gather. Behind a segment may lie the mean of the page's errors.

A *level* is what packed latents are stored as. With a trellis (``kernels/trellis``) it has one bit more than its planes: the lowest
bit of its first plane is a branch ``x``, and tokens ``t`` have ``x[t] ^ x[t-1] ^ x[t-3]`` in its place and ``x[t-2]`` below it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .geometry import Slot
from .plan import MOST_TRELLIS_BITS, RAW_BITS, BitGroup, Block, Plan

SEGMENT_ALIGNMENT_BYTES = 16
MEAN_STEP_BYTES = 2
MEANS_PER_BYTE = 4
_PLANE_WIDTHS = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}


class Plane(NamedTuple):
    """Bits ``shift`` to ``shift + bits`` of latents ``start`` to ``stop``, at ``offset`` bytes into the segment.

    ``trellis``: whether its lowest bits are branches, in which case ``shift`` is 1.
    """

    bits: int
    shift: int
    start: int
    stop: int
    offset: int
    rows: int
    trellis: bool = False

    @property
    def size(self) -> int:
        """Bytes of the plane in one page."""
        return self.rows * (self.stop - self.start)


@dataclass(frozen=True)
class SegmentLayout:
    """One unit's part of a page.

    Attributes:
        offset: bytes from the start of the page.
        size: bytes, padding to the next segment not counted.
        page_tokens: tokens of a page.
        latents: values stored per token: ``R`` and any dynamic scales, or the width ``W`` of a lossless segment.
        raw: leading latents stored as float16, token by token.
        planes: planes of the packed latents.
        lossless: whether the segment has ``[page_tokens, W]`` elements of the exact dtype instead.
    """

    offset: int
    size: int
    page_tokens: int
    latents: int
    raw: int = 0
    planes: tuple[Plane, ...] = ()
    lossless: bool = False

    @property
    def branched(self) -> int:
        """First of the latents that have a trellis, which are the last ones; ``latents`` where none has."""
        return min((plane.start for plane in self.planes if plane.trellis), default=self.latents)

    def level_bits(self) -> list[int]:
        """Bits of every latent's levels; 0 for what is stored as it is."""
        bits = [0] * self.latents
        for plane in self.planes:
            for latent in range(plane.start, plane.stop):
                bits[latent] = max(bits[latent], plane.shift + plane.bits)
        return bits

    @property
    def end(self) -> int:
        """First byte after the segment."""
        return self.offset + self.size


def coded_segment(
    groups: Sequence[BitGroup], page_tokens: int, offset: int, scale_latents: int = 0, trellis: bool = False
) -> SegmentLayout:
    """Lay out a block with packed or raw latents; dynamic scales come first, as raw latents."""
    raw = scale_latents + sum(group.count for group in groups if group.bits == RAW_BITS)
    size = raw * page_tokens * 2
    planes: list[Plane] = []
    for bits, shift, start, stop, branches in _merge_ranges(groups, raw, trellis):
        plane = Plane(bits, shift, start, stop, size, page_tokens * bits // 8, branches)
        planes.append(plane)
        size += plane.size
    latents = scale_latents + sum(group.count for group in groups)
    return SegmentLayout(offset, size, page_tokens, latents, raw, tuple(planes))


def lossless_segment(width: int, element_bytes: int, page_tokens: int, offset: int) -> SegmentLayout:
    """Lay out slots kept as they are."""
    size = page_tokens * width * element_bytes
    return SegmentLayout(offset, size, page_tokens, width, lossless=True)


def aligned(offset: int) -> int:
    """Round up to a multiple of the segment alignment."""
    return -(-offset // SEGMENT_ALIGNMENT_BYTES) * SEGMENT_ALIGNMENT_BYTES


def _merge_ranges(groups: Sequence[BitGroup], first: int, trellis: bool) -> list[tuple[int, int, int, int, bool]]:
    """List (bits, shift, start, stop, branches) of all planes; neighbouring groups that share a plane width share the plane."""
    ranges: list[tuple[int, int, int, int, bool]] = []
    start = first
    for group in groups:
        if group.bits == RAW_BITS:
            continue
        stop, branches = start + group.count, trellis and group.bits <= MOST_TRELLIS_BITS
        shift = int(branches)
        for bits in _PLANE_WIDTHS[group.bits]:
            kind = bits, shift, branches
            last = next((i for i, r in enumerate(ranges) if (*r[:2], r[4]) == kind and r[3] == start), None)
            if last is None:
                ranges.append((bits, shift, start, stop, branches))
            else:
                ranges[last] = (bits, shift, ranges[last][2], stop, branches)
            shift += bits
            branches = False
        start = stop
    return ranges


@dataclass(frozen=True)
class MeansLayout:
    """What the errors of a page's tokens have in common: a float16 step, then a code of 2 bits for each element.

    Byte ``i`` after the step has elements ``4 i`` to ``4 i + 3``, the first in its lowest bits.

    Attributes:
        offset: bytes from the start of the page.
        width: elements, ``W`` of the unit.
    """

    offset: int
    width: int

    @property
    def size(self) -> int:
        """Bytes."""
        return MEAN_STEP_BYTES + -(-self.width // MEANS_PER_BYTE)

    @property
    def end(self) -> int:
        """First byte after them."""
        return self.offset + self.size


@dataclass(frozen=True)
class PageUnit:
    """The contents of one segment of a page: a block of the plan, or the exact slots of a layer that is partly coded.

    Attributes:
        slots: slots side by side, ``W = len(slots) * head_dim``.
        segment: where they lie.
        block: index of the plan's block, or None for exact slots.
        means: where the mean error of the page's tokens lies, if it is stored.
    """

    slots: tuple[Slot, ...]
    segment: SegmentLayout
    block: int | None
    means: MeansLayout | None = None

    @property
    def end(self) -> int:
        """First byte after the unit."""
        return self.segment.end if self.means is None else self.means.end


@dataclass(frozen=True)
class PageLayout:
    """All units of a page, in order, and its size; ``windowed``: of layers that keep a window."""

    units: tuple[PageUnit, ...]
    page_bytes: int
    windowed: bool = False


def page_layouts(plan: Plan, exact_bytes: int) -> tuple[PageLayout, ...]:
    """Lay out the pages of every group of layers that has some: those that keep everything, then those that keep a window."""
    layouts = (page_layout(plan, exact_bytes, windowed) for windowed in (False, True))
    return tuple(layout for layout in layouts if layout.units)


def page_layout(plan: Plan, exact_bytes: int, windowed: bool = False) -> PageLayout:
    """Lay out the pages of layers that keep everything, or a window, when an exact element takes ``exact_bytes`` bytes."""
    units: list[PageUnit] = []
    end = 0
    for index, block in enumerate(plan.blocks):
        if plan.is_windowed(block.slots[0].layer) is not windowed:
            continue
        segment = _block_segment(plan, block, exact_bytes, aligned(end))
        means = MeansLayout(segment.end, len(block.slots) * plan.geometry.head_dim) if block.page_means else None
        units.append(PageUnit(block.slots, segment, index, means))
        end = units[-1].end
    for layer in plan.coded_layers:
        slots = tuple(slot for slot in plan.exact_slots if slot.layer == layer)
        if slots and plan.is_windowed(layer) is windowed:
            width = len(slots) * plan.geometry.head_dim
            segment = lossless_segment(width, exact_bytes, plan.page_tokens, aligned(end))
            units.append(PageUnit(slots, segment, None))
            end = segment.end
    return PageLayout(tuple(units), aligned(end), windowed)


def _block_segment(plan: Plan, block: Block, exact_bytes: int, offset: int) -> SegmentLayout:
    if block.lossless:
        width = len(block.slots) * plan.geometry.head_dim
        return lossless_segment(width, exact_bytes, plan.page_tokens, offset)
    return coded_segment(block.groups, plan.page_tokens, offset, block.scale_latents, block.trellis)
