"""What attention of each layer reads of the pages, made once and kept until something about them changes."""

from __future__ import annotations

import operator

from torch import Tensor

from ..kernels.attend import PagedPast
from ..kernels.rotary import RotaryTable
from .coder import PageCoder
from .pages import PageStore
from .sequence import SequenceState


class PageViews:
    """One ``PagedPast`` for each layer: the same object from step to step, so that a kernel can tell that nothing changed.

    Args:
        sinks: first tokens of each sequence, which are not read from the pages.
    """

    def __init__(self, sinks: int) -> None:
        self._sinks = sinks
        self._known: dict[int, tuple[tuple[object, ...], PagedPast]] = {}
        self._first: tuple[Tensor, Tensor] | None = None

    def of(
        self, layer: int, pages: PageStore, state: SequenceState, coder: PageCoder, rotary: RotaryTable | None
    ) -> PagedPast:
        """All pages, as attention of a coded layer reads them."""
        key = (pages.tokens, pages.arenas, state.padding, state.offset, coder, rotary)
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
        )
        self._known[layer] = (key, paged)
        return paged

    def forget(self) -> None:
        """Let go of pages that are no longer held."""
        self._known = {}

    def _first_read(self, padding: Tensor) -> Tensor:
        """First token of each sequence read here, int64 ``[B]``; one tensor for all layers."""
        if self._first is None or self._first[0] is not padding:
            self._first = (padding, padding + self._sinks)
        return self._first[1]
