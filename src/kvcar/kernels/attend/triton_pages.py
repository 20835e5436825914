"""Where pages and angles lie in memory, as tables that kernels read; kept from call to call."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from ...sizes import rotary_table_entries
from ...layout import SEGMENT_ALIGNMENT_BYTES
from ..rotary import RotaryTable
from .inputs import PagedPast

_Place = tuple[int, tuple[int, ...], tuple[int, ...]]

_TABLE = "triton page table"
_ANGLES: weakref.WeakKeyDictionary[RotaryTable, tuple[Tensor, Tensor]] = weakref.WeakKeyDictionary()
_TURNS: weakref.WeakKeyDictionary[RotaryTable, dict[float, Tensor]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class PageTable:
    """Where the pages lie that each sequence attends to, and what they hold; what a step reads of it is on the device.

    Attributes:
        addresses: int64 ``[B, P]``.
        last: int64 ``[B]``: tokens from this one on are not there. The table may have places for more.
        places: tokens that fit the table, or fewer where it is known that the last page is partly filled.
        positions: most positions that tokens may have.
        numbers: int64 ``[B, P]``, which page of its sequence each is; None where they are all in order.
    """

    addresses: Tensor
    last: Tensor
    places: int
    positions: int
    numbers: Tensor | None = None


def page_table(paged: PagedPast) -> PageTable:
    """The table of pages that lie in arenas; the same one again for the same past."""
    if _TABLE not in paged.kept:
        paged.kept[_TABLE] = _page_table(paged)
    return paged.kept[_TABLE]  # pyright: ignore[reportReturnType]


def _page_table(paged: PagedPast) -> PageTable:
    if paged.pages is not None and paged.whole is not None:
        whole = page_table(paged.whole)
        return replace(
            whole, addresses=whole.addresses.gather(1, paged.pages), places=paged.tokens, numbers=paged.pages
        )
    addresses = page_addresses(paged.tiles)
    end = paged.tokens if paged.pages is None else (int(paged.pages.max()) + 1) * paged.page_tokens
    last = torch.full((len(addresses),), end, dtype=torch.int64, device=addresses.device)
    return PageTable(addresses, last, paged.tokens, end, paged.pages)


def page_addresses(tiles: Sequence[Tensor]) -> Tensor:
    """Addresses int64 ``[B, pages]`` of all pages; the arenas stay where they are."""
    return _addresses(tuple(_place(tile) for tile in tiles), tiles[0].device)


def are_aligned(tiles: Sequence[Tensor]) -> bool:
    """Whether every page starts at a multiple of 16 bytes, so that elements of several bytes can be read."""
    return all(
        tile.stride(2) == 1 and not any(x % SEGMENT_ALIGNMENT_BYTES for x in (tile.data_ptr(), *tile.stride()[:2]))
        for tile in tiles
    )


def _place(tile: Tensor) -> _Place:
    return tile.data_ptr(), tuple(tile.shape), tile.stride()


@lru_cache(maxsize=16)
def _addresses(places: tuple[_Place, ...], device: torch.device) -> Tensor:
    """Depends on addresses and strides alone, so a table stays right when memory is given to other pages."""
    parts = [
        start + torch.arange(shape[0])[:, None] * stride[0] + torch.arange(shape[1]) * stride[1]
        for start, shape, stride in places
    ]
    return torch.cat(parts, dim=1).to(device)


def angle_tables(rotary: RotaryTable, tokens: int) -> tuple[Tensor, Tensor]:
    """Fine ``[2, FINE_POSITIONS, F]`` and coarse ``[2, n, F]`` cosines and sines that cover ``tokens`` positions.

    Position ``p`` is ``p // FINE_POSITIONS`` coarse steps and ``p % FINE_POSITIONS`` fine ones.
    """
    have, need = _ANGLES.get(rotary), rotary_table_entries(tokens)
    if have is None or have[1].shape[1] < need:
        fine, coarse = rotary.tables(tokens)
        have = _ANGLES[rotary] = torch.stack(fine), torch.stack(coarse)
    return have


def turn_table(rotary: RotaryTable, scale: float) -> Tensor:
    """The fine cosines and sines ``[2, FINE_POSITIONS, F]`` times ``scale``."""
    kept = _TURNS.setdefault(rotary, {})
    if scale not in kept:
        kept[scale] = torch.stack(rotary.tables(1)[0]) * scale
    return kept[scale]
