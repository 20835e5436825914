"""What one pass of the engine computes: which requests, which of their tokens are read exactly and which from codes."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from .sizes import CacheShape


@dataclass(frozen=True)
class Rows:
    """vLLM's metadata of one group of layers.

    Attributes:
        starts: first query token of every request, and the end of the last.
        lengths: tokens of every request by the end of the pass.
        block_table: blocks of every request, int32 ``[requests, blocks]``; what is before the window has no meaning.
        block_tokens: tokens of a block.
        slot_mapping: where every token of the pass is kept, int64 ``[tokens]``; below 0 for padding.
        tokens: tokens of the pass without padding.
    """

    starts: Sequence[int]
    lengths: Sequence[int]
    block_table: Tensor
    block_tokens: int
    slot_mapping: Tensor
    tokens: int


class FullPages(NamedTuple):
    """Pages that a pass fills: int64 ``[pages]`` block and request of each, and positions ``[pages, page_tokens]``."""

    blocks: Tensor
    requests: Tensor
    positions: Tensor


@dataclass(frozen=True)
class Part:
    """Queries that read the same tokens of one or several requests.

    Attributes:
        tokens: which tokens of the pass they are, a slice of one request or int64 ``[requests]``, one of each.
        requests: int64 ``[B]``.
        count: query tokens of a request.
        exact: positions int64 ``[B, S]`` read exactly, padded by repeating the last.
        sources: requests in whose blocks those are, int64 ``[B, S]`` or ``[B, 1]``.
        mask: bool ``[B, 1, count, S]``.
        pages: blocks of pages int64 ``[B, P]`` that are read, padded with 0.
        shown: tokens of each of them that are read, int64 ``[B, P]``.
        first: first token of the pages that is read, int64 ``[B]``: sinks are not.
        offset: position of the first token, int64 ``[B]`` of 0.
    """

    tokens: slice | Tensor
    requests: Tensor
    count: int
    exact: Tensor
    sources: Tensor
    mask: Tensor
    pages: Tensor
    shown: Tensor
    first: Tensor
    offset: Tensor
    _copy: list[Tensor] = field(default_factory=list)

    def in_order(self, pool: Tensor) -> Tensor:
        """Copy the pages out of a pool ``[1, blocks, page_bytes]``, once for all layers."""
        if not self._copy:
            self._copy.append(pool[0, self.pages])
        return self._copy[0]


class Step:
    """One pass.

    Args:
        rows: metadata of the layer of codes.
        groups: metadata by name of the model's layers.
        shape: of the cache.
    """

    def __init__(self, rows: Rows, groups: Mapping[str, Rows], shape: CacheShape) -> None:
        self.rows, self._groups, self._shape = rows, groups, shape
        self._slots: dict[tuple[int, int], Tensor] = {}

    def slots(self, layer: str, requests: Tensor, positions: Tensor) -> Tensor:
        """Slots of vLLM, int64, of exact tokens at ``positions`` of ``requests``, both of one shape or broadcastable."""
        own = self._groups[layer]
        return own.block_table[requests, positions // own.block_tokens].long() * own.block_tokens + (
            positions % own.block_tokens
        )

    def exact_slots(self, layer: str, part: Part) -> Tensor:
        """Slots ``[B, S]`` of the exact tokens of a part; the same for all layers of a group."""
        key = (id(self._groups[layer]), id(part))
        if key not in self._slots:
            self._slots[key] = self.slots(layer, part.sources, part.exact)
        return self._slots[key]

    @cached_property
    def full_pages(self) -> FullPages:
        """Pages whose last token is of this pass."""
        size, found = self._shape.page_tokens, []
        for request, (before, length) in enumerate(zip(self._before, self.rows.lengths, strict=True)):
            found += [(request, page) for page in range(before // size, length // size)]
        pairs = torch.tensor(found, dtype=torch.int64).reshape(-1, 2)
        requests, pages = pairs[:, 0], pairs[:, 1]
        blocks = self.rows.block_table[requests, pages].long()
        return FullPages(blocks, requests, pages[:, None] * size + torch.arange(size))

    @cached_property
    def parts(self) -> list[Part]:
        """All queries of the pass: requests of one token together, the others each by itself."""
        counts = [last - first for first, last in itertools.pairwise(self.rows.starts)]
        single = [request for request, count in enumerate(counts) if count == 1]
        parts = [self._steps(single)] if single else []
        for request, count in enumerate(counts):
            if count > 1:
                parts += self._chunks(request, count)
        return parts

    @cached_property
    def _before(self) -> list[int]:
        """Tokens that every request had before the pass."""
        starts = self.rows.starts
        return [length - (starts[request + 1] - starts[request]) for request, length in enumerate(self.rows.lengths)]

    @cached_property
    def _fillers(self) -> dict[int, int]:
        """Which request fills which block of codes in this pass, where another one may hit it in the same pass."""
        full = self.full_pages
        # In a pass that fits the window, no query is so far behind a page that the pass fills that it reads its codes.
        if self.rows.tokens <= self._shape.window + 1:
            return {}
        return dict(zip(full.blocks.tolist(), full.requests.tolist(), strict=True))

    @cached_property
    def _coded(self) -> list[int]:
        """Tokens of every request in pages that were coded before this pass."""
        size = self._shape.page_tokens
        whole = [before // size for before in self._before]
        if self._fillers:
            tables = [self.rows.block_table[row, :count].tolist() for row, count in enumerate(whole)]
            whole = [
                next((page for page, block in enumerate(own) if block in self._fillers), len(own)) for own in tables
            ]
        return [pages * size for pages in whole]

    def _paged_tokens(self, request: int, position: int) -> int:
        """Tokens that a query reads from codes: whole pages that the window leaves free and that are coded."""
        size = self._shape.page_tokens
        return min(max(0, position - self._shape.window) // size * size, self._coded[request])

    def _steps(self, requests: list[int]) -> Part:
        """Queries of one token each."""
        positions = [self.rows.lengths[request] - 1 for request in requests]
        paged = [self._paged_tokens(*each) for each in zip(requests, positions, strict=True)]
        ranges = [self._exact(p, position + 1) for p, position in zip(paged, positions, strict=True)]
        longest = max(map(len, ranges))
        exact = torch.stack([torch.cat([own, own[-1:].expand(longest - len(own))]) for own in ranges])
        mask = torch.arange(longest) < torch.tensor([len(own) for own in ranges])[:, None]
        tokens = torch.tensor([self.rows.starts[request] for request in requests])
        return self._part(tokens, requests, 1, exact, mask[:, None, None], paged)

    def _chunks(self, request: int, count: int) -> list[Part]:
        """Queries of one request: those of every page by themselves where their codes are there, otherwise together.

        What a query reads exactly then depends on its position alone and not on where chunks begin.
        """
        first, before = self.rows.starts[request], self._before[request]
        size, last = self._shape.page_tokens, before + count
        if last - 1 - self._shape.window >= self._coded[request] + size:
            return [self._chunk(request, first, before, last)]
        bounds = [before, *range((before // size + 1) * size, last, size), last]
        return [self._chunk(request, first + start - before, start, stop) for start, stop in itertools.pairwise(bounds)]

    def _chunk(self, request: int, token: int, start: int, stop: int) -> Part:
        """Queries of one request at positions ``start`` to ``stop``, the first of which is ``token`` of the pass."""
        paged = self._paged_tokens(request, start)
        exact = self._exact(paged, stop)
        mask = exact[None] <= torch.arange(start, stop)[:, None]
        tokens = slice(token, token + stop - start)
        return self._part(tokens, [request], stop - start, exact[None], mask[None, None], [paged])

    def _exact(self, paged: int, stop: int) -> Tensor:
        """Positions read exactly: sinks, and what follows the pages."""
        sinks = torch.arange(min(self._shape.sinks, paged))
        return torch.cat([sinks, torch.arange(paged, stop)])

    def _part(
        self, tokens: slice | Tensor, requests: list[int], count: int, exact: Tensor, mask: Tensor, paged: list[int]
    ) -> Part:
        which, size = torch.tensor(requests), self._shape.page_tokens
        pages = self.rows.block_table[which, : max(paged) // size].long()
        there = torch.arange(pages.shape[1]) < torch.tensor(paged)[:, None] // size
        first = torch.full_like(which, self._shape.sinks)
        sources = self._sources(requests, exact)
        return Part(
            tokens, which, count, exact, sources, mask, pages * there, there * size, first, torch.zeros_like(which)
        )  # fmt: skip

    def _sources(self, requests: list[int], exact: Tensor) -> Tensor:
        """Say in whose blocks the exact tokens are: a request's own, or those of the one that fills the page in this pass."""
        size, sources = self._shape.page_tokens, torch.tensor(requests)[:, None]
        fresh = [(row, range(self._coded[own] // size, self._before[own] // size)) for row, own in enumerate(requests)]
        if not any(pages for _, pages in fresh):
            return sources
        sources = sources.repeat(1, exact.shape[1])
        for row, pages in fresh:
            for page in pages:
                # vLLM lets go of a prefix from its end, so all pages behind one that is filled now are filled now.
                filler = self._fillers[int(self.rows.block_table[requests[row], page])]
                sources[row, exact[row] // size == page] = filler
        return sources
