"""Which token of a batch is padding, at which position each stands, which may attend to which, and which become sinks."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import CacheStateError, InputError
from .finer import FinerPages

_NEVER = torch.iinfo(torch.int64).max
_MASK_ELEMENTS_AT_ONCE = 1 << 22


class AttendedWindow(NamedTuple):
    """What layers attend to that keep a window of the past.

    Attributes:
        tokens: of the window.
        chunked: whether windows follow each other from the first token that is no padding on, instead of sliding.
    """

    tokens: int
    chunked: bool

    def since(self, index: Tensor, padding: Tensor) -> Tensor:
        """First token that each token ``index`` int64 ``[T]`` attends to, int64 ``[B or 1, T]``; may be below 0.

        Args:
            index: tokens, counted with padding.
            padding: tokens of padding of each sequence, int64 ``[B]``.
        """
        if self.chunked:
            own = index - padding[:, None]
            return own // self.tokens * self.tokens + padding[:, None]
        return index[None] - (self.tokens - 1)


class SequenceState:
    """Left padding and position offset of every sequence of a batch, and which of them are lost to NaN.

    Token ``i`` of sequence ``b`` is padding if ``i < padding[b]``, and stands at position ``i - offset[b]``. Where any
    sequence is lost, pages hold no values of it from token ``lost_from[b]`` on, and attention over it gives NaN.
    """

    def __init__(self, batch: int, device: torch.device) -> None:
        self.padding = torch.zeros(batch, dtype=torch.int64, device=device)
        self.offset = torch.zeros(batch, dtype=torch.int64, device=device)
        self.padding_most = 0
        self.lost_from: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the tables."""
        return self.padding.nbytes + self.offset.nbytes + (0 if self.lost_from is None else self.lost_from.nbytes)

    @property
    def lost(self) -> Tensor | None:
        """Which sequences are lost, bool ``[B]``; None for none."""
        return None if self.lost_from is None else self.lost_from < _NEVER

    def losing(self, bad: Tensor, start: int) -> SequenceState:
        """The state after tokens ``bad``, bool ``[B, N]``, of those from ``start`` on could not be stored."""
        state, first = copy(self), torch.where(bad.any(-1), start + bad.int().argmax(-1), _NEVER)
        state.lost_from = first if self.lost_from is None else torch.minimum(self.lost_from, first)
        return state

    def cropped(self, tokens: int) -> SequenceState:
        """The state where only the first ``tokens`` tokens are left in the pages: what was lost after them is gone."""
        if self.lost_from is None:
            return self
        state = copy(self)
        state.lost_from = _any_lost(self.lost_from.masked_fill(self.lost_from >= tokens, _NEVER))
        return state

    def mapped(self, change: Callable[[Tensor], Tensor]) -> SequenceState:
        """The state of other sequences: ``change`` of every table, which works on the batch axis (0)."""
        state = SequenceState(0, self.padding.device)
        state.padding, state.offset = change(self.padding), change(self.offset)
        state.padding_most = int(state.padding.max())
        state.lost_from = None if self.lost_from is None else _any_lost(change(self.lost_from))
        return state

    def advance(self, seen: int, count: int, mask: Tensor | None, positions: Tensor | None) -> SequenceState:
        """State for a pass over ``count`` tokens after ``seen``, checked against what was known before.

        Args:
            seen: tokens of earlier passes.
            count: tokens of this pass.
            mask: attention mask ``[B, seen + count]`` or None when nothing is padded that was not before.
            positions: ``[B or 1, count]`` or None for the default, which counts all tokens.

        Raises:
            InputError: the mask is not left padding, disagrees with an earlier one, or is missing after one that padded.
            CacheStateError: positions have gaps, or are negative.
        """
        if count == 0:
            raise InputError(
                f"no new token was given after the {seen} that the cache has; give the whole conversation with something new "
                "at its end, or reset the cache"
            )
        if self._goes_on(seen, count, mask, positions):
            return self
        if mask is None and seen and self.padding_most:
            raise InputError(
                "an earlier pass had padding, and this one has no attention mask, without which a model takes padding for "
                f"text; give the mask over all {seen + count} tokens"
            )
        after = copy(self)
        after.padding = self.padding if mask is None else _kept(self.padding, self._read_mask(seen, count, mask))
        after.padding_most = self.padding_most if after.padding is self.padding else int(after.padding.max())
        after.offset = _kept(self.offset, self._read_positions(seen, count, positions, after.padding))
        return after

    def _goes_on(self, seen: int, count: int, mask: Tensor | None, positions: Tensor | None) -> bool:
        """Whether mask and positions say only what is known already, as in most steps; asks the device once."""
        batch, total = len(self.padding), seen + count
        if mask is None or positions is None or mask.shape != (batch, total) or positions.shape[-1] != count:
            return False
        index = torch.arange(total, device=self.padding.device)
        same_mask = mask.to(index.device).bool() == (index >= self.padding[:, None])
        same_positions = positions.to(index.device) == index[seen:] - self.offset[:, None]
        return bool(same_mask.all() & same_positions.all())

    def _read_mask(self, seen: int, count: int, mask: Tensor) -> Tensor:
        batch = len(self.padding)
        if mask.ndim != 2 or tuple(mask.shape) != (batch, seen + count):
            raise InputError(
                f"the attention mask has shape {tuple(mask.shape)}, but batch {batch} has {seen} cached and {count} new "
                f"tokens; kvcar needs a 2-D mask over all of them, ({batch}, {seen + count}); for another prompt, reset the cache"
            )
        mask = mask.to(self.padding.device).bool()
        padding = (mask.long().cumsum(-1) == 0).sum(-1)
        index = torch.arange(seen + count, device=mask.device)
        if not torch.equal(mask, index >= padding[:, None]):
            raise InputError("the attention mask has zeros after the first one; kvcar supports left padding only")
        if not torch.equal(padding.clamp_max(seen), self.padding.clamp_max(seen)):
            raise InputError(
                "the attention mask pads tokens differently than in an earlier pass; reset the cache first"
            )
        return padding

    def _read_positions(self, seen: int, count: int, positions: Tensor | None, padding: Tensor) -> Tensor:
        index = torch.arange(seen, seen + count, device=padding.device)
        # What a model does that is given none: it counts all tokens, padding too.
        positions = index[None] if positions is None else positions
        if positions.is_floating_point() or positions.dtype == torch.bool:
            raise InputError(f"position_ids must be whole numbers, got {positions.dtype}")
        positions = positions.to(padding.device).expand(len(padding), -1)
        if positions.shape[-1] != count:
            raise InputError(
                f"position_ids has {positions.shape[-1]} positions for {count} tokens, after {seen} tokens that the cache has; "
                "a prompt for a cache that has tokens must go on after them: give the whole conversation with something new at "
                "its end, or reset the cache"
            )
        real = index >= padding[:, None]
        # The last token of a left-padded pass is real unless the whole pass is padding.
        offset = torch.where(real[:, -1], index[-1] - positions[:, -1], self.offset)
        if not torch.equal(torch.where(real, index - offset[:, None], 0), torch.where(real, positions, 0)):
            raise CacheStateError(
                "position_ids must rise by one from token to token; kvcar cannot rotate such keys back"
            )
        if (real & (index < offset[:, None])).any():
            raise CacheStateError(
                "position_ids of tokens that are no padding are negative; kvcar cannot rotate such keys back"
            )
        known = (padding < seen) & (offset != self.offset)
        if known.any():
            raise CacheStateError("position_ids go on elsewhere than the cached tokens stopped; reset the cache first")
        return offset


def _any_lost(lost_from: Tensor) -> Tensor | None:
    return lost_from if bool((lost_from < _NEVER).any()) else None


def _kept(old: Tensor, new: Tensor) -> Tensor:
    """The old tensor where the new one says the same, so that what was made for it stays good."""
    return old if torch.equal(old, new) else new


def exact_mask(
    state: SequenceState,
    seen: int,
    paged: int,
    tokens: int,
    sinks: int,
    finer: FinerPages | None = None,
    since: Tensor | None = None,
) -> Tensor | None:
    """Mask over sinks and finer pages (once pages exist), window and the pass under way.

    Args:
        state: of the pass under way.
        seen: tokens of earlier passes; paged: those of them that lie in pages; tokens: those of this pass.
        sinks: first tokens of each sequence that stay exact.
        finer: the pages whose tokens do.
        since: first token that each query of this pass attends to, int64 ``[B or 1, T]``; None for all of the past.

    Returns:
        bool ``[B or 1, 1, T, S]``, True where a query may attend, or None where every query may attend to everything.
    """
    settled, finer = state.padding_most + sinks, finer if finer is not None and finer.pages else None
    if (
        finer is None
        and since is None
        and tokens == 1
        and (paged >= settled or (paged == 0 and state.padding_most == 0))
    ):
        return None
    device, total = state.padding.device, seen + tokens
    index = torch.arange(paged, total, device=device)
    query = torch.arange(seen, total, device=device)
    visible = (index[None, :] <= query[:, None]) & (index >= state.padding[:, None])[:, None, :]
    if since is not None:
        visible = visible & (index >= since[..., None])
    if paged:
        sink = state.padding[:, None] + torch.arange(sinks, device=device)
        before = sink < paged
        if finer is not None:
            before = torch.cat([before, finer.visible(state.padding + sinks, paged)], dim=-1)
            sink = torch.cat([sink, finer.token_index().expand(len(sink), -1)], dim=-1)
        before = before[:, None].expand(-1, tokens, -1)
        if since is not None:
            before = before & (sink[:, None] >= since[..., None])
        visible = torch.cat([before, visible.expand(len(sink), -1, -1)], dim=-1)
    return visible[:, None]


def is_causal_mask(
    mask: Tensor, state: SequenceState, seen: int, tokens: int, window: AttendedWindow | None = None
) -> bool:
    """Whether a mask shows every token that is no padding exactly itself and all tokens before it that are none.

    Args:
        mask: ``[B or 1, H or 1, T, S]``: bool, True where a query may attend, or 0 there and the dtype's lowest elsewhere.
        state: of the pass under way.
        seen: tokens of earlier passes; tokens: those of this pass.
        window: which of the tokens before it a token attends to, where not to all; the mask may then leave out the oldest ones.
    """
    batch, total, device = len(state.padding), seen + tokens, state.padding.device
    shown_tokens = total if window is None else min(total, window.tokens - 1 + tokens)
    if mask.ndim != 4 or mask.shape[2] != tokens or mask.shape[0] not in (1, batch):
        return False
    if not shown_tokens <= mask.shape[3] <= total:
        return False
    index, right = torch.arange(total, device=device), torch.ones((), dtype=torch.bool, device=device)
    query, index = index[seen:], index[total - mask.shape[3] :]
    rows = max(1, _MASK_ELEMENTS_AT_ONCE // (mask.shape[1] * tokens * total))
    for start in range(0, batch, rows):
        own = mask if mask.shape[0] == 1 else mask[start : start + rows]
        shown = own if own.dtype == torch.bool else own == 0
        if own.dtype != torch.bool:
            right &= (shown | (own <= torch.finfo(own.dtype).min / 2)).all()
        padding = state.padding[start : start + rows, None]
        expected = (index <= query[:, None]) & (index >= padding)[:, None, :]
        if window is not None:
            expected = expected & (index >= window.since(query, padding[:, 0])[..., None])
        right &= ((shown == expected[:, None]) | (query < padding)[:, None, :, None]).all()
    return bool(right)


def sink_places(state: SequenceState, start: int, leave: int, sinks: int) -> Tensor | None:
    """Place of every sink among the ``leave`` tokens from token ``start`` on that are about to become pages.

    Returns:
        int64 ``[B, sinks]``, -1 where a sink is not among them; None if none is.
    """
    if leave == 0 or sinks == 0 or start >= state.padding_most + sinks:
        return None
    place = state.padding[:, None] + torch.arange(sinks, device=state.padding.device) - start
    return torch.where((place >= 0) & (place < leave), place, -1)
