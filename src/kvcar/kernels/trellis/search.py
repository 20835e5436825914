"""Which levels a page's latents are coded by: the nearest in all that branches allow, by Viterbi's search of 8 states."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..backend import Operation, backend_for
from .bits import branches_of

SEARCH = Operation("search of a trellis", __package__ or "")
STATES = 8
_UNREACHED = 1e30
_BEYOND = 64.0
"""Targets lie at most so far beyond all levels, so that float32 tells errors from each other."""

# State: the branches of the last three tokens, the latest in the lowest bit. Into each state leads one from either of two, whose
# third branches are 0 and 1; the two lowest bits of the level on the way.
_INTO = [[(state >> 1) | (third << 2) for state in range(STATES)] for third in (0, 1)]
_LOWEST = [
    [2 * ((state & 1) ^ (state >> 1 & 1) ^ third) + (state >> 2 & 1) for state in range(STATES)] for third in (0, 1)
]


@dataclass(frozen=True, eq=False)
class Branches:
    """Where the trellis of each latent stands.

    Attributes:
        states: uint8 ``[..., R]``: branches of the last three tokens, the latest in the lowest bit.
    """

    states: Tensor

    @classmethod
    def after(cls, levels: Tensor) -> Branches:
        """After levels ``[..., T, R]`` of a page's first tokens."""
        branches = branches_of(levels.to(torch.uint8))
        states = torch.zeros_like(branches[..., 0, :])
        for back in range(min(3, branches.shape[-2])):
            states |= branches[..., -1 - back, :] << back
        return cls(states)


def nearest_levels(targets: Tensor, highest: Tensor, begin: Branches | None = None) -> Tensor:
    """Find levels float32 ``[P, T, R]``.

    Args:
        targets: float32 ``[P, T, R]`` in units of half a step, of which 0 is the lowest level; a trellis runs over ``T``.
        highest: float32 ``[R]``, the highest level.
        begin: where it begins; None for a page's first token.
    """
    states = None if begin is None else begin.states
    near = targets.clamp_min(-_BEYOND).minimum(highest + _BEYOND)
    return SEARCH.choose(backend_for(targets.device), "any", near, highest, states)(near, highest, states)


@SEARCH.register("torch")
def search(targets: Tensor, highest: Tensor, states: Tensor | None) -> Tensor:
    """Search for all pages and latents at once, a token at a time; ``states`` uint8 ``[P, R]``."""
    pages, tokens, latents = targets.shape
    into, lowest = torch.tensor(_INTO, device=targets.device), torch.tensor(_LOWEST, device=targets.device)
    cost = targets.new_full((STATES, pages, latents), _UNREACHED)
    first = torch.zeros(pages, latents, dtype=torch.int64, device=targets.device) if states is None else states.long()
    cost.scatter_(0, first[None], 0.0)
    ways: list[Tensor] = []
    for token in range(tokens):
        errors = (_nearest(targets[:, token], highest) - targets[:, token]).square()
        zero, one = (cost[into[third]] + errors[lowest[third]] for third in (0, 1))
        ways.append(one < zero)
        cost = torch.minimum(zero, one)
    return _path(targets, highest, ways, cost.argmin(0))


def _path(targets: Tensor, highest: Tensor, ways: list[Tensor], state: Tensor) -> Tensor:
    """Levels on the way to the last ``state`` int64 ``[P, R]``."""
    into, lowest = torch.tensor(_INTO, device=targets.device), torch.tensor(_LOWEST, device=targets.device)
    levels = torch.empty_like(targets)
    for token in reversed(range(targets.shape[1])):
        third = ways[token].gather(0, state[None])[0].long()
        near = _nearest(targets[:, token], highest)
        levels[:, token] = near.gather(0, lowest[third, state][None])[0]
        state = into[third, state]
    return levels


def _nearest(targets: Tensor, highest: Tensor) -> Tensor:
    """The nearest level ``[4, ...]`` to each target that has 0, 1, 2 or 3 for its two lowest bits."""
    lowest = torch.arange(4, dtype=targets.dtype, device=targets.device).view(4, *(1 for _ in targets.shape))
    quarters = ((targets - lowest) / 4 + 0.5).clamp_min(0).floor()
    return 4 * torch.minimum(quarters, ((highest - lowest) / 4).floor()) + lowest
