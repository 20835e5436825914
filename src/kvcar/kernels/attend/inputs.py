"""What attention over a compressed past is given, the same for every implementation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ...layout import SegmentLayout
from ..pack import unpack
from ..rotary import RotaryTable


@dataclass(frozen=True, eq=False)
class Reader:
    """How one unit's segment gives the keys or the values of some KV heads of one layer.

    Attributes:
        segment: where the unit lies in a page.
        heads: KV heads of the layer, in the order of the columns below.
        restore: stored values ``[..., S]`` to what is decoded ``[..., R]``; None when they are the same.
        decode: restored values ``[..., R]`` to ``[..., len(heads) * D]`` float32.
        affine: matrix ``[R, len(heads) * D]`` and bias with which ``decode`` is ``u @ matrix + bias``; None when
            the decoder is not affine or the segment is lossless.
        rotated: keys are stored after RoPE and need no rotation.
        exact_dtype: dtype of the elements of a lossless segment.
    """

    segment: SegmentLayout
    heads: tuple[int, ...]
    restore: Callable[[Tensor], Tensor] | None
    decode: Callable[[Tensor], Tensor]
    affine: tuple[Tensor, Tensor] | None
    rotated: bool
    exact_dtype: torch.dtype

    @cached_property
    def affine_in_codes(self) -> bool:
        """Whether nothing but a matrix and a bias stand between codes and vectors."""
        return self.affine is not None and self.restore is None

    def stored(self, *pages: Tensor) -> Tensor:
        """Stored values float32 ``[B, N, S]`` of consecutive ``pages`` uint8 ``[B, pages, page_bytes]``."""
        segment = self.segment
        parts = [run[..., segment.offset : segment.end] for run in pages]
        data = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        if segment.lossless:
            u = data.contiguous().view(self.exact_dtype).float()
        else:
            u = unpack(data, segment)
        return u.reshape(data.shape[0], -1, segment.latents)

    def restored(self, *pages: Tensor, tokens: slice = slice(None)) -> Tensor:
        """What ``decode`` takes, float32 ``[B, N, R]``, of ``tokens`` of the same pages."""
        u = self.stored(*pages)[:, tokens]
        return u if self.restore is None else self.restore(u)


class Held(NamedTuple):
    """Tokens ``start`` to ``stop`` of buffers of keys and values ``[B, H, room, D]``.

    The buffers stay the same from step to step, so that a kernel need not ask them anew where they lie.
    """

    keys: Tensor
    values: Tensor
    start: int
    stop: int


@dataclass(frozen=True)
class ExactPast:
    """Tokens held exactly: sinks, window and the tokens of this pass.

    Attributes:
        keys, values: ``[B, H, S, D]``, keys after RoPE.
        mask: bool, broadcastable to ``[B, 1, T, S]``, True where a query may attend; None for everywhere. It covers
            ``before`` too.
        before: tokens before those, perhaps in a narrower dtype; ``joined`` puts them in front.
    """

    keys: Tensor
    values: Tensor
    mask: Tensor | None
    before: Held | None = None

    def joined(self) -> ExactPast:
        """The same tokens with nothing before them."""
        if self.before is None:
            return self
        old_keys, old_values, start, stop = self.before
        sides = ((old_keys, self.keys), (old_values, self.values))
        keys, values = (torch.cat([held[:, :, start:stop].to(new.dtype), new], dim=2) for held, new in sides)
        return ExactPast(keys, values, self.mask)


@dataclass(frozen=True)
class PagedPast:
    """Tokens held as pages. Token ``i`` of a sequence lies in page ``i // page_tokens``.

    With ``pages``, the tiles hold only some pages: what follows calls *place* where a token lies in the tiles, and *index*
    which token of its sequence it is. The two are the same where all pages are there.

    Attributes:
        tiles: consecutive runs of pages, uint8 ``[B, pages, page_bytes]``; the last page may be partly filled.
        tokens: tokens that are really there, in the tiles.
        first: first token of each sequence that is attended here, int64 ``[B]``; those before are padding or sinks.
        first_most: the largest of ``first``, known without asking the device.
        offset: position of token ``i`` is ``i - offset``, int64 ``[B]``.
        key_readers, value_readers: together they give every KV head once.
        rotary: the layer's rotation, or None for models without.
        pages: int64 ``[B, K]``, ascending, which pages of each sequence the tiles hold; None for all pages in order. A
            page that is partly filled is the last one of every sequence.
        whole: with ``pages``, the past that they were chosen from, where the tiles hold all its pages nevertheless;
            ``gathered`` makes them hold those alone.
    """

    tiles: Sequence[Tensor]
    tokens: int
    first: Tensor
    first_most: int
    offset: Tensor
    key_readers: tuple[Reader, ...]
    value_readers: tuple[Reader, ...]
    rotary: RotaryTable | None
    pages: Tensor | None = None
    whole: PagedPast | None = None

    @property
    def page_tokens(self) -> int:
        """Tokens of a page."""
        return self.key_readers[0].segment.page_tokens

    @property
    def scattered(self) -> bool:
        """Whether the tiles hold other pages besides ``pages``."""
        return self.whole is not None

    @cached_property
    def kept(self) -> dict[str, object]:
        """What a kernel made of it and needs again, by a name of its own; a step's past is often the last one's."""
        return {}

    @cached_property
    def hidden_pages(self) -> Tensor:
        """How many of each sequence's first pages hold nothing but padding and sinks, int64 ``[B]``."""
        return self.first // self.page_tokens

    def token_index(self, start: int, count: int) -> Tensor:
        """Indices int64 ``[B or 1, count]`` of the tokens at places ``start`` on; less ``offset``, their positions."""
        place = torch.arange(start, start + count, device=self.offset.device)[None]
        if self.pages is None:
            return place
        page = self.pages.index_select(1, place[0] // self.page_tokens)
        return page * self.page_tokens + place % self.page_tokens

    def visible(self, start: int, count: int) -> Tensor | None:
        """Which tokens at places ``start`` on may be attended, bool ``[B, count]``; None for all of them."""
        if (start if self.pages is None else 0) >= self.first_most:
            return None
        return self.token_index(start, count) >= self.first[:, None]

    def only(self, pages: Tensor, gather: bool = True, with_last: bool | None = None) -> PagedPast:
        """The same past with nothing but ``pages`` int64 ``[B, K]``, ascending; all pages must be there now.

        Args:
            pages: which pages of each sequence; one that is partly filled is taken for all sequences or for none.
            gather: copy what the readers need of them into one tile; otherwise the result is ``scattered``.
            with_last: whether the page that is partly filled is among them, where that is known; None looks.

        Raises:
            ValueError: a partly filled page is taken for some sequences only.
        """
        tokens, missing = pages.shape[1] * self.page_tokens, -self.tokens % self.page_tokens
        if missing and (self._takes_last(pages) if with_last is None else with_last):
            tokens -= missing
        # Not ``replace``, which takes three times as long; a decode step comes here once a layer.
        some = PagedPast(
            self.tiles, tokens, self.first, self.first_most, self.offset, self.key_readers, self.value_readers,
            self.rotary, pages, self,
        )  # fmt: skip
        return some.gathered() if gather else some

    def gathered(self) -> PagedPast:
        """The same past with tiles that hold no page but those it attends to."""
        if self.pages is None or self.whole is None:
            return self
        return replace(self, tiles=(_gathered(self, self.pages),), whole=None)

    def _takes_last(self, pages: Tensor) -> bool:
        taken = set((pages[:, -1] == self.tokens // self.page_tokens).tolist())
        if len(taken) > 1:
            raise ValueError("the partly filled page must be among the pages of every sequence or of none")
        return True in taken


def _gathered(paged: PagedPast, pages: Tensor) -> Tensor:
    """One tile uint8 ``[B, K, page_bytes]`` of some pages; only the bytes that the readers read are filled in."""
    segments = {reader.segment.offset: reader.segment for reader in (*paged.key_readers, *paged.value_readers)}
    places = [(arena, index) for arena in paged.tiles for index in range(arena.shape[1])]
    tile = paged.tiles[0].new_empty(*pages.shape, paged.tiles[0].shape[2])
    for sequence, wanted in enumerate(pages.tolist()):
        taken = [arena[sequence, index : index + 1] for arena, index in (places[page] for page in wanted)]
        for segment in segments.values():
            # Three times as fast on a CPU as indexing the arenas, of which there are many.
            columns = slice(segment.offset, segment.end)
            tile[sequence, :, columns] = torch.cat([page[:, columns] for page in taken])
    return tile


def pick(x: Tensor, heads: tuple[int, ...]) -> Tensor:
    """Some heads of ``[B, H, ...]``, without a copy when they are all of them in order."""
    return x if heads == tuple(range(x.shape[1])) else x[:, list(heads)]
