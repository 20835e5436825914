"""Who may attend to which exactly held token, and which tokens become sinks."""

from __future__ import annotations

import torch
from torch import Tensor

from .sequence import SequenceState


def exact_mask(state: SequenceState, seen: int, paged: int, tokens: int, sinks: int) -> Tensor | None:
    """Mask over sinks (once pages exist), window and the pass under way.

    Args:
        state: of the pass under way.
        seen: tokens of earlier passes; paged: those of them that lie in pages; tokens: those of this pass.
        sinks: first tokens of each sequence that stay exact.

    Returns:
        bool ``[B or 1, 1, T, S]``, True where a query may attend, or None where every query may attend to everything.
    """
    settled = state.padding_most + sinks
    if tokens == 1 and (paged >= settled or (paged == 0 and state.padding_most == 0)):
        return None
    device, total = state.padding.device, seen + tokens
    index = torch.arange(paged, total, device=device)
    query = torch.arange(seen, total, device=device)
    visible = (index[None, :] <= query[:, None]) & (index >= state.padding[:, None])[:, None, :]
    if paged:
        sink = state.padding[:, None] + torch.arange(sinks, device=device)
        reached = (sink < paged)[:, None, :].expand(-1, tokens, -1)
        visible = torch.cat([reached, visible.expand(len(sink), -1, -1)], dim=-1)
    return visible[:, None]


def sink_places(state: SequenceState, start: int, leave: int, sinks: int) -> Tensor | None:
    """Place of every sink among the ``leave`` tokens from token ``start`` on that are about to become pages.

    Returns:
        int64 ``[B, sinks]``, -1 where a sink is not among them; None if none is.
    """
    if leave == 0 or sinks == 0 or start >= state.padding_most + sinks:
        return None
    place = state.padding[:, None] + torch.arange(sinks, device=state.padding.device) - start
    return torch.where((place >= 0) & (place < leave), place, -1)
