"""Turning the oldest tokens of the window into pages, for all layers at once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from ..errors import CacheStateError
from ..geometry import KINDS, Slot
from ..kernels.rotary import RotaryTable
from ..plan import Plan
from .coder import PageCoder, UnitCoder
from .layer import CodedLayer
from .pages import PageStores
from .sequence import SequenceState

_log = logging.getLogger("kvcar")

# Of a block in float32: so much at once that its codec is not read often, and little exists.
_ELEMENTS_AT_ONCE = 2**22

RotaryOf = Callable[[int], RotaryTable | None]


def tokens_encoded_at_once(plan: Plan, batch: int) -> int:
    """Tokens of whole pages of each of ``batch`` sequences that are encoded at once."""
    widest = max((len(block.slots) for block in plan.blocks), default=1) * plan.geometry.head_dim
    return max(1, _ELEMENTS_AT_ONCE // (widest * plan.page_tokens * batch)) * plan.page_tokens


def encode_oldest(
    layers: Mapping[int, CodedLayer],
    pages: PageStores,
    coder: PageCoder,
    state: SequenceState,
    rotary_of: RotaryOf,
    leave: int,
    with_costs: bool = False,
) -> Tensor | None:
    """Append the oldest ``leave`` tokens of all layers to ``pages``, a few pages at a time so that little exists at once.

    Returns:
        ``with_costs`` what it costs to read their codes, nats float32 ``[B, leave]``, 0 for padding and sinks; None where no
        codec knows.
    """
    start, costs, first, page_tokens = pages.tokens, [], 0, coder.plan.page_tokens
    at_once = tokens_encoded_at_once(coder.plan, len(state.padding))
    index = torch.arange(start, start + leave, device=state.padding.device)
    there = index >= state.padding[:, None] + coder.plan.sinks
    while first < leave:
        # Up to where a page ends, then whole pages, then what is left: what a page costs is known where all of it is at hand.
        missing, left = -pages.tokens % page_tokens, leave - first
        count = min(left, missing or (min(left, at_once) // page_tokens * page_tokens or left))
        fetch = _fetcher(layers, state, rotary_of, pages.tokens, first, count)
        if pages.fits_whole(count):
            own = there[:, first : first + count]
            coded = [unit.whole_pages(unit.vectors(fetch), own, with_costs) for unit in coder.units]
            pages.append_packed([each.data for each in coded], [each.means for each in coded])
            found = [each.cost for each in coded]
        else:
            parts = [_part_of_page(unit, unit.vectors(fetch), pages, with_costs) for unit in coder.units]
            pages.append([data for data, _ in parts])
            found = [cost for _, cost in parts]
        known = [cost for cost in found if cost is not None]
        costs += [torch.stack(known).sum(0)] if known else []
        first += count
    return torch.cat(costs, dim=1).masked_fill(~there, 0.0) if costs else None


def _part_of_page(unit: UnitCoder, x: Tensor, pages: PageStores, with_costs: bool) -> tuple[Tensor, Tensor | None]:
    """Code vectors of less than a page, perhaps the end of one that has a mean error already, which then is not theirs.

    Returns:
        Stored values ``[B, N, R]``, and what their errors cost, ``[B, N]`` or None.
    """
    means = pages.open_means(unit)
    x = x if means is None else x.float() - means
    data = unit.stored(x, pages.open_stored(unit))
    known = with_costs and unit.knows_cost
    return data, unit.coded.cost(unit.coded.error(x.float(), data), data.shape[1]) if known else None


@contextmanager
def stored_plainly(device: torch.device) -> Iterator[None]:
    """Run what outlives a pass outside of gradients, autocast and inference mode, whatever the model's pass is in.

    A tensor that is made in inference mode could not be written to after it.
    """
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def without_lost(layers: Mapping[int, CodedLayer], leave: int, state: SequenceState, paged: int) -> SequenceState:
    """Look for NaN and infinity, which codes cannot hold, in the tokens that are about to leave.

    A sequence that has some is lost, as it is in a model's own cache, and does not keep the others of its batch from
    going on.

    Args:
        layers: that hold the tokens.
        leave: how many of them leave, the oldest.
        state: of the pass under way.
        paged: tokens in the pages.

    Returns:
        The state with what is lost.

    Raises:
        CacheStateError: all sequences are lost; nothing has been stored then.
    """
    bad, where = torch.zeros(len(state.padding), leave, dtype=torch.bool, device=state.padding.device), ""
    for layer, coded in layers.items():
        for kind, side in zip(KINDS, coded.oldest(0, leave), strict=True):
            finite = torch.isfinite(side)
            if not finite.all():
                bad |= ~finite.all(-1).all(1)
                where = where or f"the {kind}s of layer {layer}"
    if not where:
        return state
    after = state.losing(bad, paged)
    assert after.lost is not None
    if after.lost.all():
        raise CacheStateError(
            f"{where} hold NaN or infinity, so they cannot be stored as codes; check the model's weights and dtype"
        )
    fresh = after.lost if state.lost is None else after.lost & ~state.lost
    if fresh.any():
        _log.warning(
            "%s hold NaN or infinity in sequences %s of a batch of %d; their outputs are NaN from here on, the others go on",
            where, fresh.nonzero().flatten().tolist(), len(bad),
        )  # fmt: skip
    return after


def _fetcher(
    layers: Mapping[int, CodedLayer],
    state: SequenceState,
    rotary_of: RotaryOf,
    token: int,
    first: int,
    count: int,
) -> Callable[[Slot, bool], Tensor]:
    """Access to the vectors ``[B, count, D]`` of tokens ``token`` on, keys before or after RoPE.

    They are the ``count`` from the ``first``-oldest on that the layers hold.
    """
    index = torch.arange(token, token + count, device=state.offset.device)
    positions = index - state.offset[:, None]
    memo: dict[tuple[int, str, bool], Tensor] = {}

    def fetch(slot: Slot, before_rope: bool) -> Tensor:
        key = (slot.layer, slot.kind, before_rope)
        if key not in memo:
            side = layers[slot.layer].oldest(first, count)[KINDS.index(slot.kind)]
            rotary = rotary_of(slot.layer)
            if state.lost_from is not None:
                side = torch.nan_to_num(side, nan=0.0, posinf=0.0, neginf=0.0)
            if slot.kind == "key" and before_rope and rotary is not None:
                side = rotary.unrotate(side, positions)
            memo[key] = side
        return memo[key][:, slot.head]

    return fetch
