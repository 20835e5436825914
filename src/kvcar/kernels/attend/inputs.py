"""The inputs of attention over a compressed past, the same for every implementation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from ...layout import SegmentLayout
from ..backend import Operation
from ..pack import unpack
from ..page_means import PageMeans
from ..rotary import RotaryTable

# A step has few query tokens (decoding), a chunk has many (prefill), or there are no pages yet.
ATTENTION = Operation("attention", __package__ or "", cases=("step", "chunk"))
READ_TABLES: set[Callable[..., Tensor]] = set()
"""Implementations that follow ``PagedPast.table``; the others are given pages in order."""


@dataclass(frozen=True, eq=False)
class RoundedDecoder:
    """A decoder of codes ``u`` in 8 bits: ``u[:exact] @ exact + (u[exact:] @ decoder) * scale + bias``.

    Attributes:
        exact: of the leading latents, floating point ``[exact, len(heads) * D]``.
        decoder: of the latents after those, int8 ``[len(heads), groups, D, 4]``: ``[h, g, d, i]`` is what latent
            ``exact + 4 * g + i`` adds to element ``d`` of head ``h``; 0 where there is no such latent.
        scale, bias: of every element, float32 ``[len(heads) * D]``.
    """

    exact: Tensor
    decoder: Tensor
    scale: Tensor
    bias: Tensor

    def affine(self, latents: int) -> tuple[Tensor, Tensor]:
        """Matrix ``[latents, len(heads) * D]`` and bias, float32, made anew at every call."""
        rows = self.decoder.permute(1, 3, 0, 2).flatten(2).flatten(0, 1)[: latents - len(self.exact)]
        return torch.cat([self.exact.float(), rows * self.scale]), self.bias


@runtime_checkable
class KeepsTensors(Protocol):
    """What a kernel keeps with a reader, as memory counts it."""

    def tensors(self) -> Iterable[Tensor]:
        """All tensors that it keeps, also those that it shares with others."""
        ...


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
        rounded: the same decoder as ``affine`` as it lies in memory in 8 bits, where it does.
        means: what each page adds to what is decoded of it, where pages store that.
    """

    segment: SegmentLayout
    heads: tuple[int, ...]
    restore: Callable[[Tensor], Tensor] | None
    decode: Callable[[Tensor], Tensor]
    affine: tuple[Tensor, Tensor] | None
    rotated: bool
    exact_dtype: torch.dtype
    rounded: RoundedDecoder | None = None
    means: PageMeans | None = None

    @property
    def is_affine(self) -> bool:
        """Whether a matrix and a bias turn what is restored into vectors."""
        return self.affine is not None or self.rounded is not None

    def matrix_and_bias(self) -> tuple[Tensor, Tensor]:
        """Matrix ``[R, len(heads) * D]`` and bias of an affine decoder; of one in 8 bits made anew, so not to be kept."""
        if self.affine is not None:
            return self.affine
        assert self.rounded is not None
        return self.rounded.affine(self.segment.latents)

    @cached_property
    def kept(self) -> dict[str, object]:
        """What kernels made of it and need again, by names of their own; see ``KeepsTensors``."""
        return {}

    def tensors(self) -> list[Tensor]:
        """Decoders, and what kernels made of them."""
        tensors = [] if self.affine is None else [*self.affine]
        if self.rounded is not None:
            tensors += [self.rounded.exact, self.rounded.decoder, self.rounded.scale, self.rounded.bias]
        if self.means is not None:
            tensors.append(self.means.scale)
        return tensors + [t for own in self.kept.values() if isinstance(own, KeepsTensors) for t in own.tensors()]

    @cached_property
    def affine_in_codes(self) -> bool:
        """Whether nothing but a matrix and a bias stand between codes and vectors."""
        return self.is_affine and self.restore is None

    def stored(self, *pages: Tensor) -> Tensor:
        """Unpack stored values float32 ``[B, N, S]`` of consecutive ``pages`` uint8 ``[B, pages, page_bytes]``."""
        segment = self.segment
        parts = [run[..., segment.offset : segment.end] for run in pages]
        data = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        if segment.lossless:
            u = data.contiguous().view(self.exact_dtype).float()
        else:
            u = unpack(data, segment)
        return u.reshape(data.shape[0], -1, segment.latents)

    def restored(self, *pages: Tensor, tokens: slice = slice(None)) -> Tensor:
        """Unpack and restore ``tokens`` of the same pages: what ``decode`` takes, float32 ``[B, N, R]``."""
        u = self.stored(*pages)[:, tokens]
        return u if self.restore is None else self.restore(u)

    def vectors(self, restored: Tensor, pages: Sequence[Tensor], tokens: slice = slice(None)) -> Tensor:
        """Decode what ``restored`` gave of the same pages and tokens, float32 ``[B, N, len(heads) * D]``, means added."""
        decoded = self.decode(restored)
        if self.means is None:
            return decoded
        return decoded + self.means.of(pages).repeat_interleave(self.segment.page_tokens, dim=1)[:, tokens]


class Buffered(NamedTuple):
    """Tokens ``start`` to ``stop`` of buffers of keys and values ``[B, H, room, D]``.

    The buffers stay the same from step to step, so that a kernel need not ask them anew where they lie.
    """

    keys: Tensor
    values: Tensor
    start: int
    stop: int


@dataclass(frozen=True)
class ExactPast:
    """Tokens kept exactly: sinks, window and the tokens of this pass.

    Attributes:
        keys, values: ``[B, H, S, D]``, keys after RoPE.
        mask: bool, broadcastable to ``[B, 1, T, S]``, True where a query may attend; None for everywhere. It covers
            ``before`` too.
        before: tokens before those, perhaps in a narrower dtype; ``joined`` puts them in front.
    """

    keys: Tensor
    values: Tensor
    mask: Tensor | None
    before: Buffered | None = None

    def joined(self) -> ExactPast:
        """Return the same tokens with nothing before them."""
        if self.before is None:
            return self
        old_keys, old_values, start, stop = self.before
        sides = ((old_keys, self.keys), (old_values, self.values))
        keys, values = (torch.cat([old[:, :, start:stop].to(new.dtype), new], dim=2) for old, new in sides)
        return ExactPast(keys, values, self.mask)


@dataclass(frozen=True)
class PagedPast:
    """Tokens in pages. Token ``i`` of a sequence lies in page ``i // page_tokens``.

    Attributes:
        tiles: consecutive runs of pages, uint8 ``[B, pages, page_bytes]``; the last page may be partly filled.
        tokens: tokens that are in the pages.
        first: first token of each sequence that is attended here, int64 ``[B]``; those before are padding or sinks.
        largest_first: the largest of ``first``, known without asking the device.
        offset: position of token ``i`` is ``i - offset``, int64 ``[B]``.
        key_readers, value_readers: together they give every KV head once.
        rotary: the layer's rotation, or None for models without.
        shown: int64 ``[B, pages or more]``: so many tokens at a page's beginning are attended here; None for all of them.
        since: first token that each query attends to, int64 ``[B or 1, T]``, in layers that keep a window; None for ``first``.
        largest_since: a bound of those, known without asking the device.
        table: where pages lie in no order, as an engine hands them out: int64 ``[B, pages]``, for each page of a sequence which
            of the pages of the only tile, ``[1, pages of all, page_bytes]``, it is; None where they lie one after the other.
    """

    tiles: Sequence[Tensor]
    tokens: int
    first: Tensor
    largest_first: int
    offset: Tensor
    key_readers: tuple[Reader, ...]
    value_readers: tuple[Reader, ...]
    rotary: RotaryTable | None
    shown: Tensor | None = None
    since: Tensor | None = None
    largest_since: int = 0
    table: Tensor | None = None

    def in_order(self) -> PagedPast:
        """Return the same past with its pages one after the other: a copy, where there is a table."""
        if self.table is None:
            return self
        return replace(self, tiles=[self.tiles[0][0, self.table]], table=None)

    @property
    def page_tokens(self) -> int:
        """Tokens of a page."""
        return self.key_readers[0].segment.page_tokens

    @cached_property
    def positions(self) -> int:
        """Positions that tables of angles must reach; more than tokens where the first one stands beyond 0."""
        return self.tokens + max(0, -int(self.offset.min()))

    @cached_property
    def kept(self) -> dict[str, object]:
        """What kernels made of it and need again, by names of their own; a step's past is often the last one's."""
        return {}

    def token_index(self, start: int, count: int) -> Tensor:
        """Return indices int64 ``[1, count]`` of the tokens from ``start`` on; less ``offset``, their positions."""
        return torch.arange(start, start + count, device=self.offset.device)[None]

    def visible(self, start: int, count: int) -> Tensor | None:
        """Return which tokens from ``start`` on may be attended, bool ``[B, count]``; None for all of them."""
        index = self.token_index(start, count)
        after = None if start >= self.largest_first else index >= self.first[:, None]
        if self.shown is None:
            return after
        page, place = index[0] // self.page_tokens, index[0] % self.page_tokens
        shown = place < self.shown[:, page]
        return shown if after is None else after & shown

    def mask(self, start: int, count: int) -> Tensor | None:
        """Return which tokens from ``start`` on each query may attend to, bool ``[B or 1, 1, T or 1, count]``; None for all."""
        visible = self.visible(start, count)
        mask = None if visible is None else visible[:, None, None]
        if self.since is None or start >= self.largest_since:
            return mask
        within = (self.token_index(start, count)[:, None] >= self.since[..., None])[:, None]
        return within if mask is None else mask & within


def pick(x: Tensor, heads: tuple[int, ...]) -> Tensor:
    """Select some heads of ``[B, H, ...]``, without a copy when they are all of them in order."""
    return x if heads == tuple(range(x.shape[1])) else x[:, list(heads)]


def all_heads(readers: tuple[Reader, ...], vectors: Callable[[Reader], Tensor]) -> Tensor:
    """Join vectors ``[B, H, N, D]`` of all heads; ``vectors`` gives those of a reader, ``[B, N, len(heads) * D]``."""
    parts: dict[int, Tensor] = {}
    for reader in readers:
        own = vectors(reader).unflatten(-1, (len(reader.heads), -1))
        parts |= {head: own[:, :, place] for place, head in enumerate(reader.heads)}
    return torch.stack([parts[head] for head in range(len(parts))], dim=1)


def turned_keys(paged: PagedPast, keys: Tensor, start: int) -> Tensor:
    """Rotate keys ``[B, H, N, D]`` of the tokens from ``start`` on; those stored after RoPE stay as they are."""
    turning = [head for reader in paged.key_readers if not reader.rotated for head in reader.heads]
    if paged.rotary is None or not turning:
        return keys
    positions = paged.token_index(start, keys.shape[2]) - paged.offset[:, None]
    if len(turning) == keys.shape[1]:
        return paged.rotary.rotate(keys, positions)
    keys[:, turning] = paged.rotary.rotate(keys[:, turning], positions)
    return keys
