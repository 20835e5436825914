"""Decoded pages kept for measuring: the same numbers as decoding them at each step, in a fraction of the time.

This gives back all the memory that a compressed cache saves, so it is for evaluation alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..kernels.attend import ExactPast, PagedPast, Reader, all_heads, turned_keys

_GROWTH_TOKENS = 512


class DecodedPast:
    """Keys after RoPE and values of the tokens in the pages, decoded once, for every layer that was asked for."""

    def __init__(self) -> None:
        self._sides: dict[int, tuple[Tensor, Tensor]] = {}
        self._tokens: dict[int, int] = {}
        self._fresh = _Fresh()

    def extend(self, layer: int, exact: ExactPast, paged: PagedPast) -> ExactPast:
        """``exact`` with the pages' tokens in front of it, decoded as attention over pages would.

        Args:
            layer: a coded layer.
            exact: what comes after the pages.
            paged: all pages.
        """
        keys, values = self._up_to(layer, paged)
        mask = _joined_mask(exact, paged)
        return ExactPast(
            torch.cat([keys, exact.keys.to(keys.dtype)], dim=2),
            torch.cat([values, exact.values.to(values.dtype)], dim=2),
            mask,
        )

    def crop(self, tokens: int) -> None:
        """Forget all but the first ``tokens`` tokens."""
        self._tokens = {layer: min(filled, tokens) for layer, filled in self._tokens.items()}
        self._fresh = _Fresh()

    def map_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace what is decoded by ``change`` of it, which works on the batch axis (0)."""
        # Without the room behind, which is many times what a short text fills.
        for layer, (keys, values) in self._sides.items():
            filled = self._tokens[layer]
            self._sides[layer] = (change(keys[:, :, :filled]), change(values[:, :, :filled]))
        self._fresh = _Fresh()

    def _up_to(self, layer: int, paged: PagedPast) -> tuple[Tensor, Tensor]:
        filled = self._tokens.get(layer, 0)
        if filled < paged.tokens:
            fresh = self._fresh.keys(paged, filled), self._fresh.values(paged, filled)
            self._sides[layer] = self._grown(layer, filled, paged.tokens, fresh)
            self._tokens[layer] = paged.tokens
        keys, values = self._sides[layer]
        return keys[:, :, : paged.tokens], values[:, :, : paged.tokens]

    def _grown(self, layer: int, filled: int, tokens: int, fresh: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        grown = []
        for side, new in enumerate(fresh):
            batch, heads, _, dim = new.shape
            buffer = self._sides[layer][side] if layer in self._sides else new.new_empty(batch, heads, 0, dim)
            if buffer.shape[2] < tokens:
                room = -(-tokens // _GROWTH_TOKENS) * _GROWTH_TOKENS
                larger = new.new_empty(batch, heads, room, dim)
                larger[:, :, :filled] = buffer[:, :, :filled]
                buffer = larger
            buffer[:, :, filled:tokens] = new
            grown.append(buffer)
        return grown[0], grown[1]


class _Fresh:
    """Decodes the latest tokens of one layer after the other.

    Only those, also of a page that older ones share: stepping one token at a time would decode each of them as often as
    a page has tokens. What several layers read, of a block that spans them, is unpacked once.
    """

    def __init__(self) -> None:
        self._span = (0, 0)
        self._restored: dict[int, Tensor] = {}

    def keys(self, paged: PagedPast, first: int) -> Tensor:
        """Keys after RoPE ``[B, H, N, D]`` of the tokens from ``first`` on."""
        return turned_keys(paged, self._side(paged.key_readers, paged, first), first)

    def values(self, paged: PagedPast, first: int) -> Tensor:
        """Values of the same tokens."""
        return self._side(paged.value_readers, paged, first)

    def _side(self, readers: tuple[Reader, ...], paged: PagedPast, first: int) -> Tensor:
        if self._span != (first, paged.tokens):
            self._span, self._restored = (first, paged.tokens), {}
        return all_heads(readers, lambda reader: self._of(reader, paged, first))

    def _of(self, reader: Reader, paged: PagedPast, first: int) -> Tensor:
        page, skipped = divmod(first, paged.page_tokens)
        tokens, pages = slice(skipped, paged.tokens - page * paged.page_tokens), _pages_from(paged, page)
        # All readers of a segment restore its values alike.
        key = reader.segment.offset
        if key not in self._restored:
            # Contiguous: a product of scattered rows runs as one product for each sequence, many times slower.
            self._restored[key] = reader.restored(*pages, tokens=tokens).contiguous()
        return reader.vectors(self._restored[key], pages, tokens)


def _pages_from(paged: PagedPast, page: int) -> list[Tensor]:
    """The filled pages from ``page`` on."""
    last = -(-paged.tokens // paged.page_tokens)
    found, seen = [], 0
    for arena in paged.tiles:
        low, high = max(page - seen, 0), min(last - seen, arena.shape[1])
        if low < high:
            found.append(arena[:, low:high])
        seen += arena.shape[1]
    return found


def _joined_mask(exact: ExactPast, paged: PagedPast) -> Tensor | None:
    """Mask over the pages' tokens and the exact ones after them."""
    visible = paged.visible(0, paged.tokens)
    if visible is None and exact.mask is None:
        return None
    device = exact.keys.device
    if visible is None:
        visible = torch.ones(1, paged.tokens, dtype=torch.bool, device=device)
    pages = visible[:, None, None, :]
    if exact.mask is None:
        own = torch.ones(1, 1, 1, exact.keys.shape[2], dtype=torch.bool, device=device)
    else:
        own = exact.mask
    batch, tokens = max(pages.shape[0], own.shape[0]), own.shape[2]
    return torch.cat([pages.expand(batch, 1, tokens, -1), own.expand(batch, 1, tokens, -1)], dim=-1)
