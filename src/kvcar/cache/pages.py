"""Packed pages: a store that grows by further arenas and shares them with forks, and what attention reads of it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..kernels.attend import PagedPast
from ..kernels.rotary import RotaryTable
from ..sizes import next_arena_pages
from .coder import PageCoder, UnitCoder, UnitContents
from .finer import FinerPages
from .sequence import SequenceState

_PAGES_AT_ONCE = 8


class PageStore:
    """Pages of all sequences of a batch, uint8 ``[B, pages, page_bytes]`` in a list of arenas.

    Args:
        units: what a page consists of.
        page_bytes: bytes of a page.
        page_tokens: tokens of a page.
        windowed: whether pages are freed once a window has passed them; there is then no room ahead either.

    Attributes:
        tokens: tokens in the pages, those that were freed counted.
        freed_pages: first pages that are freed.
    """

    def __init__(self, units: Sequence[UnitCoder], page_bytes: int, page_tokens: int, windowed: bool = False) -> None:
        self._units = units
        self._page_bytes, self._page_tokens = page_bytes, page_tokens
        self.windowed = windowed
        self.arenas: list[Tensor] = []
        self.tokens = self.freed_pages = 0
        self._shared: set[int] = set()

    @property
    def freed_tokens(self) -> int:
        """First tokens whose pages are freed."""
        return self.freed_pages * self._page_tokens

    @property
    def allocated_pages(self) -> int:
        """Pages that exist, filled or not."""
        return sum(arena.shape[1] for arena in self.arenas)

    @property
    def page_bytes(self) -> int:
        """Bytes of a page."""
        return self._page_bytes

    @property
    def nbytes(self) -> int:
        """Bytes of all arenas."""
        return sum(arena.nbytes for arena in self.arenas)

    def append(self, stored: Sequence[Tensor]) -> None:
        """Add tokens: stored values ``[B, N, R]`` of every unit, in the units' order.

        A page that the last call left partly filled is completed by writing it anew, its old codes unchanged.
        """
        page, filled = divmod(self.tokens - self.freed_tokens, self._page_tokens)
        count = stored[0].shape[1]
        means = [self._means_of_page(unit, page) if filled else None for unit in self._units]
        if filled:
            tail = self._page(page)
            stored = [
                torch.cat([self._unpack(unit, tail)[:, :filled].to(new.dtype), new], dim=1)
                for unit, new in zip(self._units, stored, strict=True)
            ]
        self._write(page, self._pack(stored, means))
        self.tokens += count

    def use(self, units: Sequence[UnitCoder]) -> None:
        """Go on with other units, equal to those that there were."""
        self._units = units

    def has(self, unit: UnitCoder) -> bool:
        """Whether these pages have what the unit codes."""
        return any(own is unit for own in self._units)

    def open_means(self, unit: UnitCoder) -> Tensor | None:
        """The mean error ``[B, 1, W]`` that the page under way is read with; None where it has none."""
        page, filled = divmod(self.tokens - self.freed_tokens, self._page_tokens)
        data = self._means_of_page(unit, page) if filled else None
        return None if data is None else unit.read_means(data)

    def open_stored(self, unit: UnitCoder) -> Tensor | None:
        """Stored values ``[B, n, R]`` of the page under way; None where it has none yet."""
        page, filled = divmod(self.tokens - self.freed_tokens, self._page_tokens)
        return self._unpack(unit, self._page(page))[:, :filled] if filled else None

    def append_packed(self, packed: Sequence[Tensor], means: Sequence[Tensor | None]) -> None:
        """Add whole pages: bytes uint8 ``[B, pages, size]`` of every unit and of its means, in the units' order."""
        pages = self._joined_units(packed, means)
        self._write(self.tokens // self._page_tokens - self.freed_pages, pages)
        self.tokens += pages.shape[1] * self._page_tokens

    def contents(self) -> tuple[UnitContents, ...]:
        """Stored values of all tokens, 0 of those that were freed, for every unit, in dtypes as narrow as what they hold."""
        runs: list[Tensor] = []
        for arena, used in self._used():
            runs += arena[:, :used].split(_PAGES_AT_ONCE, dim=1) if used else []
        if not runs and not self.freed_pages:
            return ()
        if self.freed_pages:
            batch = self.arenas[0].shape[0]
            runs.insert(0, self.arenas[0].new_zeros(batch, self.freed_pages, self._page_bytes))
        return tuple(self._joined([unit.contents(run) for run in runs]) for unit in self._units)

    def fill(self, contents: Sequence[UnitContents], device: torch.device) -> None:
        """Take in what ``contents`` of another store of the same layout gave; this one must be empty."""
        step = _PAGES_AT_ONCE * self._page_tokens
        for start in range(0, contents[0].raw.shape[1] if contents else 0, step):
            parts = [_run_of(each, start, step, self._page_tokens) for each in contents]
            stored = [unit.stored_of(part).to(device) for unit, part in zip(self._units, parts, strict=True)]
            means = [part.means.to(device) if part.means.shape[-1] else None for part in parts]
            self._write(start // self._page_tokens, self._pack(stored, means))
            self.tokens += stored[0].shape[1]

    def fork(self) -> PageStore:
        """A store with the same tokens; whichever of the two writes to an arena that both have copies it first."""
        fork = PageStore(self._units, self._page_bytes, self._page_tokens, self.windowed)
        fork.arenas, fork.tokens, fork.freed_pages = list(self.arenas), self.tokens, self.freed_pages
        self._shared = set(range(len(self.arenas)))
        fork._shared = set(self._shared)
        return fork

    def crop(self, tokens: int) -> None:
        """Forget all but the first ``tokens`` tokens; arenas that hold none of them are freed."""
        self.tokens = tokens
        # An empty one says how many sequences there are, where all pages are freed.
        self.arenas = [a for i, (a, used) in enumerate(self._used()) if used or (i == 0 and self.freed_pages)]
        self._shared = {index for index in self._shared if index < len(self.arenas)}

    def free(self, pages: int) -> None:
        """Forget the first ``pages`` pages, whose tokens must all have been stored; those that are left move together."""
        if pages <= self.freed_pages:
            return
        used = torch.cat([arena[:, :count] for arena, count in self._used()], dim=1)
        # A copy, without which the freed pages would stay in memory.
        self.arenas = [used[:, pages - self.freed_pages :].clone()]
        self.freed_pages = pages
        self._shared = set()

    def map_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace every arena by ``change`` of it, which works on the batch axis (0)."""
        self.arenas = [_changed(arena, change, used) for arena, used in self._used()]
        self._shared = set()

    def _used(self) -> Iterator[tuple[Tensor, int]]:
        """Every arena and how many of its pages hold tokens."""
        left = -(-self.tokens // self._page_tokens) - self.freed_pages
        for arena in self.arenas:
            used = min(left, arena.shape[1])
            yield arena, used
            left -= used

    def _joined(self, parts: Sequence[UnitContents]) -> UnitContents:
        """Consecutive runs as one, without what lies beyond the last token."""
        raw, codes = torch.cat([p.raw for p in parts], dim=1), torch.cat([p.codes for p in parts], dim=1)
        means = torch.cat([p.means for p in parts], dim=1)
        return UnitContents(raw[:, : self.tokens], codes[:, : self.tokens], means)

    def _pack(self, stored: Sequence[Tensor], means: Sequence[Tensor | None]) -> Tensor:
        """Pages of stored values ``[B, N, R]``, the last one padded; ``means`` of the first pages, 0 in others."""
        count = stored[0].shape[1]
        pages = -(-count // self._page_tokens)
        missing, shape = pages * self._page_tokens - count, (pages, self._page_tokens)
        padded = (torch.nn.functional.pad(u, (0, 0, 0, missing)) if missing else u for u in stored)
        return self._joined_units(
            [unit.pack(u.unflatten(1, shape)) for unit, u in zip(self._units, padded, strict=True)], means
        )

    def _joined_units(self, packed: Sequence[Tensor], means: Sequence[Tensor | None]) -> Tensor:
        """Pages uint8 ``[B, pages, page_bytes]`` of their units' bytes; means of the first pages."""
        shape = (*packed[0].shape[:2], self._page_bytes)
        out = torch.zeros(shape, dtype=torch.uint8, device=packed[0].device)
        for unit, own, common in zip(self._units, packed, means, strict=True):
            segment, place = unit.unit.segment, unit.unit.means
            out[..., segment.offset : segment.end] = own
            if place is not None and common is not None:
                out[:, : common.shape[1], place.offset : place.end] = common
        return out

    def _means_of_page(self, unit: UnitCoder, page: int) -> Tensor | None:
        place = unit.unit.means
        return None if place is None else self._page(page)[..., place.offset : place.end]

    def _unpack(self, unit: UnitCoder, pages: Tensor) -> Tensor:
        slots = unit.unit.slots
        return unit.reader(slots[:1], (0,), 1).stored(pages)

    def _page(self, index: int) -> Tensor:
        for arena in self.arenas:
            if index < arena.shape[1]:
                return arena[:, index : index + 1]
            index -= arena.shape[1]
        raise IndexError(index)

    def _write(self, start: int, pages: Tensor) -> None:
        """Put ``pages`` at page ``start`` on, allocating what is missing."""
        while self.allocated_pages < start + pages.shape[1]:
            missing = start + pages.shape[1] - self.allocated_pages
            size = missing if self.windowed else next_arena_pages(self.allocated_pages)
            shape = (pages.shape[0], size, self._page_bytes)
            self.arenas.append(torch.zeros(shape, dtype=torch.uint8, device=pages.device))
        first = 0
        for index, arena in enumerate(self.arenas):
            low, high = max(start, first), min(start + pages.shape[1], first + arena.shape[1])
            if low < high:
                self._own(index)[:, low - first : high - first] = pages[:, low - start : high - start]
            first += arena.shape[1]

    def _own(self, index: int) -> Tensor:
        """An arena that no other store reads."""
        if index in self._shared:
            # A new list, by which views notice.
            self.arenas = [*self.arenas[:index], self.arenas[index].clone(), *self.arenas[index + 1 :]]
            self._shared.discard(index)
        return self.arenas[index]


def _run_of(contents: UnitContents, start: int, count: int, page_tokens: int) -> UnitContents:
    """The tokens from ``start`` on, up to ``count`` of them, both multiples of a page."""
    tokens = slice(start, start + count)
    pages = slice(start // page_tokens, (start + count) // page_tokens)
    return UnitContents(contents.raw[:, tokens], contents.codes[:, tokens], contents.means[:, pages])


def _changed(arena: Tensor, change: Callable[[Tensor], Tensor], used: int) -> Tensor:
    """``change(arena)``, of which only the first ``used`` pages hold anything."""
    if used == arena.shape[1]:
        return change(arena)
    changed = change(arena[:, :used])
    # Not ``new_zeros``, which writes all of the room; this leaves it to the system to do so when it is used.
    room = torch.zeros(changed.shape[0], *arena.shape[1:], dtype=arena.dtype, device=arena.device)
    room[:, :used] = changed
    return room


class PageStores:
    """The pages of all groups of layers, as one store: those that keep everything, and those that keep a window.

    Args:
        coder: of the bundle, for the device that they are on and the dtype of what is stored exactly.
    """

    def __init__(self, coder: PageCoder) -> None:
        self.coder, self._page_tokens = coder, coder.plan.page_tokens
        self._stores = tuple(
            PageStore([coder.units[i] for i in places], layout.page_bytes, self._page_tokens, layout.windowed)
            for layout, places in coder.groups
        )
        self.tokens = 0

    def use(self, coder: PageCoder) -> None:
        """Go on with the coder of another attachment, of an equal bundle, for the same device and dtype."""
        if coder is self.coder:
            return
        self.coder = coder
        for store, (_, places) in zip(self._stores, coder.groups, strict=True):
            store.use([coder.units[i] for i in places])

    @property
    def arenas(self) -> list[Tensor]:
        """The arenas of all groups."""
        return [arena for store in self._stores for arena in store.arenas]

    @property
    def nbytes(self) -> int:
        """Bytes of all arenas."""
        return sum(store.nbytes for store in self._stores)

    def nbytes_where(self, page_bytes: Callable[[bool], int]) -> int:
        """Bytes that they would have where a page of a group (windowed or not) had ``page_bytes`` bytes."""
        return sum(store.nbytes * page_bytes(store.windowed) // store.page_bytes for store in self._stores)

    @property
    def windowed(self) -> PageStore | None:
        """The pages of layers that keep a window."""
        return next((store for store in self._stores if store.windowed), None)

    def of(self, windowed: bool) -> PageStore:
        """The pages of a group that there is."""
        return next(store for store in self._stores if store.windowed is windowed)

    def append(self, stored: Sequence[Tensor]) -> None:
        """See ``PageStore.append``."""
        self._each(PageStore.append, stored)
        self.tokens += stored[0].shape[1]

    def fits_whole(self, tokens: int) -> bool:
        """Whether ``tokens`` more begin and end where pages do."""
        return self.tokens % self._page_tokens == 0 and tokens % self._page_tokens == 0

    def open_means(self, unit: UnitCoder) -> Tensor | None:
        """See ``PageStore.open_means``."""
        return self._with(unit).open_means(unit)

    def open_stored(self, unit: UnitCoder) -> Tensor | None:
        """See ``PageStore.open_stored``."""
        return self._with(unit).open_stored(unit)

    def _with(self, unit: UnitCoder) -> PageStore:
        """The store whose pages have what the unit codes."""
        return next(store for store in self._stores if store.has(unit))

    def append_packed(self, packed: Sequence[Tensor], means: Sequence[Tensor | None]) -> None:
        """See ``PageStore.append_packed``."""
        both = list(zip(packed, means, strict=True))
        self._each(lambda store, own: store.append_packed(*map(list, zip(*own, strict=True))), both)
        self.tokens += packed[0].shape[1] * self._page_tokens

    def contents(self) -> tuple[UnitContents, ...]:
        """See ``PageStore.contents``."""
        found = {}
        for store, (_, places) in zip(self._stores, self.coder.groups, strict=True):
            found |= zip(places, store.contents(), strict=False)
        return tuple(found[place] for place in sorted(found))

    def fill(self, contents: Sequence[UnitContents], device: torch.device) -> None:
        """See ``PageStore.fill``."""
        self._each(lambda store, own: store.fill(own, device), contents)
        self.tokens = max((store.tokens for store in self._stores), default=0)

    def fork(self) -> PageStores:
        """See ``PageStore.fork``."""
        fork = PageStores(self.coder)
        fork._stores, fork.tokens = tuple(store.fork() for store in self._stores), self.tokens
        return fork

    def crop(self, tokens: int) -> None:
        """See ``PageStore.crop``."""
        for store in self._stores:
            store.crop(tokens)
        self.tokens = tokens

    def map_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        """See ``PageStore.map_batch``."""
        for store in self._stores:
            store.map_batch(change)

    def _each(self, do: Callable[[PageStore, list[Any]], None], of_units: Sequence[Any]) -> None:
        """Do something with each store and what its units have of ``of_units``."""
        for store, (_, places) in zip(self._stores, self.coder.groups, strict=True):
            do(store, [of_units[place] for place in places] if of_units else [])


class Since:
    """Where windows of the tokens of a pass begin: one object for all layers that keep one.

    Args:
        first: first token that each token of the pass attends to, int64 ``[B or 1, T]``.
        largest: a bound of them, known without asking the device.
    """

    def __init__(self, first: Tensor, largest: int) -> None:
        self.first, self._largest = first, largest
        self._applied: tuple[Tensor, int, Tensor, Tensor] | None = None

    def applied(self, paged: PagedPast, freed: int) -> PagedPast:
        """The past from there on, its tokens counted from the first page that is not freed on."""
        first, offset = self._counted_from(paged, freed)
        largest, queries = max(0, paged.largest_first - freed), self.first.shape[1]
        paged = replace(paged, tokens=paged.tokens - freed, first=first, offset=offset, largest_first=largest)
        if queries == 1:
            return replace(paged, largest_first=max(largest, self._largest - freed))
        return replace(paged, since=self.first - freed, largest_since=max(0, self._largest - freed))

    def _counted_from(self, paged: PagedPast, freed: int) -> tuple[Tensor, Tensor]:
        """``first``, with the window of a single token, and ``offset``; the same tensors for all layers."""
        known = self._applied
        if known is None or known[0] is not paged.offset or known[1] != freed:
            first = paged.first
            if self.first.shape[1] == 1:
                first = torch.maximum(first, self.first[:, 0])
            known = self._applied = (paged.offset, freed, (first - freed).clamp_min(0), paged.offset - freed)
        return known[2], known[3]


class PageViews:
    """One ``PagedPast`` for each layer: the same object from step to step, so that a kernel can tell that nothing changed.

    Args:
        sinks: first tokens of each sequence, which are not read from the pages.
    """

    def __init__(self, sinks: int) -> None:
        self._sinks = sinks
        self._known: dict[int, tuple[tuple[object, ...], PagedPast]] = {}
        self._first: tuple[Tensor, Tensor] | None = None
        self._shown: tuple[FinerPages, tuple[int, int], Tensor | None] | None = None

    def of(
        self,
        layer: int,
        pages: PageStore,
        state: SequenceState,
        coder: PageCoder,
        rotary: RotaryTable | None,
        finer: FinerPages,
        since: Since | None = None,
    ) -> PagedPast:
        """All pages, as attention of a coded layer reads them; in a layer with a window, those from ``since`` on."""
        key = (pages.tokens, pages.arenas, state.padding, state.offset, coder, rotary, finer, since)
        known = self._known.get(layer)
        if known is not None and all(map(operator.is_, known[0], key)):
            return known[1]
        paged = PagedPast(
            tiles=pages.arenas,
            tokens=pages.tokens,
            first=self._first_read(state.padding),
            largest_first=state.padding_most + self._sinks,
            offset=state.offset,
            key_readers=coder.readers(layer, "key"),
            value_readers=coder.readers(layer, "value"),
            rotary=rotary,
            shown=self._shown_tokens(finer, pages),
        )
        if since is not None:
            paged = since.applied(paged, pages.freed_tokens)
        self._known[layer] = (key, paged)
        return paged

    def forget(self) -> None:
        """Let go of pages that are gone."""
        self._known = {}

    def _shown_tokens(self, finer: FinerPages, pages: PageStore) -> Tensor | None:
        """Tokens of each page that are read from its codes; one tensor for all layers."""
        given = pages.allocated_pages, pages.freed_pages
        if self._shown is None or self._shown[0] is not finer or self._shown[1] != given:
            self._shown = (finer, given, finer.shown_tokens(*given))
        return self._shown[2]

    def _first_read(self, padding: Tensor) -> Tensor:
        """First token of each sequence read here, int64 ``[B]``; one tensor for all layers."""
        if self._first is None or self._first[0] is not padding:
            self._first = (padding, padding + self._sinks)
        return self._first[1]
