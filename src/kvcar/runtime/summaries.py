"""Summaries of the pages' keys, and which pages a decode step attends to by them.

A page is summarised when it is full: from the exact keys where they are at hand, which is when its tokens all leave
together, and otherwise (no window, tokens taken back, a cache that was loaded) from the keys that its codes decode to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..kernels.allocation import allocated_pages
from ..kernels.attend import PagedPast
from ..kernels.backend import Backend
from ..kernels.select import CHOSEN_SUMMARY, SUMMARIES, Summary, choose_pages
from .decoded import decoded_keys

# Pages to attend to: of every layer, or one number for each layer of the model.
PageCounts = int | Sequence[int]
LONGEST_SELECTING_PASS_TOKENS = 16
_PAGES_AT_ONCE = 8
SUMMARY_DTYPE = torch.float16
_LARGEST = torch.finfo(SUMMARY_DTYPE).max


class PageSummaries:
    """Summaries float16 ``[B, H, room, vectors * D]`` of every coded layer's full pages.

    One tensor for each layer, so that one product scores all pages; it grows as the pages' arenas do, by an eighth.

    Args:
        most: pages that a decode step attends to, in every layer or in each one.
        page_tokens: tokens of a page.
        summary: name in ``SUMMARIES``.
    """

    def __init__(self, most: PageCounts, page_tokens: int, summary: str = CHOSEN_SUMMARY) -> None:
        self._most = most
        self._page_tokens = page_tokens
        self._summary = SUMMARIES[summary]()
        self._buffers: dict[int, Tensor] = {}
        self._filled: dict[int, Tensor] = {}
        self._pages: dict[int, int] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all summaries, unfilled room included."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    @property
    def summary(self) -> Summary:
        """What is kept of a page."""
        return self._summary

    def most_of(self, layer: int) -> int:
        """Pages that a decode step attends to in a layer."""
        return self._most if isinstance(self._most, int) else self._most[layer]

    def held(self, layer: int) -> Tensor | None:
        """Summaries ``[B, H, pages, vectors * D]`` of a layer's summarised pages, None before there are any."""
        return self._filled_part(layer, self._pages[layer]) if layer in self._pages else None

    def add(self, layer: int, keys: Tensor, token: int, first: Tensor) -> None:
        """Summarise exact keys ``[B, H, N, D]`` after RoPE, those of tokens ``token`` on, as far as they fill pages.

        Nothing happens where earlier tokens of the first page are missing; ``catch_up`` makes up for that.

        Args:
            layer: a coded layer.
            keys: of tokens that are becoming pages.
            token: the first of them.
            first: first token of each sequence that is neither padding nor a sink, int64 ``[B]``.
        """
        if token == self._pages.get(layer, 0) * self._page_tokens:
            self._append(layer, keys, first)

    def catch_up(self, layer: int, paged: PagedPast) -> None:
        """Summarise the full pages that have no summary yet, from decoded keys."""
        full = paged.tokens // self._page_tokens
        for page in range(self._pages.get(layer, 0), full, _PAGES_AT_ONCE):
            stop = min(page + _PAGES_AT_ONCE, full) * self._page_tokens
            self._append(layer, decoded_keys(replace(paged, tokens=stop), page), paged.first)

    def choose(
        self, layer: int, query: Tensor, paged: PagedPast, scaling: float, backend: Backend | None = None
    ) -> PagedPast:
        """The pages that ``query`` ``[B, Hq, T, D]`` attends to, scattered; ``paged`` itself where it is all of them."""
        full, rest = divmod(paged.tokens, self._page_tokens)
        most = self.most_of(layer)
        if query.shape[2] > LONGEST_SELECTING_PASS_TOKENS or full + (rest > 0) <= most:
            return paged
        if self._pages.get(layer, 0) != full:
            self.catch_up(layer, paged)
        with_next = rest > 0
        held, hidden = self._filled_part(layer, full), paged.hidden_pages
        chosen = choose_pages(query, held, self._summary, scaling, most, hidden, with_next, backend)
        return paged.only(chosen, gather=False, with_last=with_next)

    def crop(self, tokens: int) -> None:
        """Forget all pages but those that the first ``tokens`` tokens fill."""
        full = tokens // self._page_tokens
        for layer, pages in self._pages.items():
            self._pages[layer] = min(pages, full)
            self._resize(layer)

    def map_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor by ``change`` of it, which works on the batch axis (0)."""
        self._buffers = {layer: change(buffer) for layer, buffer in self._buffers.items()}
        self._filled = {}

    def fork(self, most: PageCounts) -> PageSummaries:
        """The same summaries, to be added to without changing these."""
        fork = PageSummaries(most, self._page_tokens)
        fork._summary, fork._pages = self._summary, dict(self._pages)
        fork._buffers = {layer: buffer.clone() for layer, buffer in self._buffers.items()}
        return fork

    def _filled_part(self, layer: int, pages: int) -> Tensor:
        """Summaries ``[B, H, pages, vectors * D]`` of the first pages: a view, the same one from step to step."""
        part = self._filled.get(layer)
        if part is None or part.shape[2] != pages:
            part = self._filled[layer] = self._buffers[layer][:, :, :pages]
        return part

    def _append(self, layer: int, keys: Tensor, first: Tensor) -> None:
        count, held = keys.shape[2] // self._page_tokens, self._pages.get(layer, 0)
        if count == 0:
            return
        index = torch.arange(held * self._page_tokens, (held + count) * self._page_tokens, device=keys.device)
        visible = (index >= first[:, None]).view(-1, 1, count, self._page_tokens, 1)
        paged = keys[:, :, : count * self._page_tokens].float().unflatten(2, (count, self._page_tokens))
        fresh = self._summary.summarise(paged, visible).clamp(-_LARGEST, _LARGEST)
        if layer not in self._buffers:
            self._buffers[layer] = torch.zeros(
                *fresh.shape[:2], 0, fresh.shape[3], dtype=SUMMARY_DTYPE, device=fresh.device
            )
        self._pages[layer] = held + count
        self._resize(layer)
        self._buffers[layer][:, :, held : held + count] = fresh

    def _resize(self, layer: int) -> None:
        """Give a layer's tensor the room that its pages call for."""
        self._filled.pop(layer, None)
        old, room = self._buffers[layer], allocated_pages(self._pages[layer])
        if room == old.shape[2]:
            return
        new = old.new_zeros(*old.shape[:2], room, old.shape[3])
        kept = min(room, old.shape[2])
        new[:, :, :kept] = old[:, :, :kept]
        self._buffers[layer] = new
