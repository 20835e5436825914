"""Bits of levels: what branches they come from, and what is stored of them."""

from __future__ import annotations

import torch
from torch import Tensor

_BACK = ((1, 1), (2, 0), (3, 1))
"""(tokens back, bit): the branch of that token is in that bit of a level."""


def changes_of(branches: Tensor) -> Tensor:
    """What branches ``[..., T, n]`` of tokens before change in levels that have their own for their second bit."""
    changes = torch.zeros_like(branches)
    for back, bit in _BACK:
        changes[..., back:, :] ^= branches[..., :-back, :] << bit
    return changes


def branches_of(levels: Tensor) -> Tensor:
    """Branches ``[..., T, n]`` of levels of whole numbers, from a page's first token on."""
    branches = levels >> 1 & 1
    for token in range(1, branches.shape[-2]):
        branches[..., token, :] ^= branches[..., token - 1, :]
        if token >= 3:
            branches[..., token, :] ^= branches[..., token - 3, :]
    return branches


def with_branches(levels: Tensor, first: int) -> Tensor:
    """Levels uint8 ``[..., T, R]`` with their branches for the second bit of latents from ``first`` on."""
    own = levels[..., first:]
    if not own.shape[-1]:
        return levels
    changed = (own & ~torch.tensor(2, dtype=own.dtype, device=own.device)) | (branches_of(own) << 1)
    return torch.cat([levels[..., :first], changed], dim=-1)


def stored_codes(levels: Tensor, first: int) -> Tensor:
    """Levels ``[..., R]`` without the bit that is known from the tokens before, of latents from ``first`` on: ``b`` bits."""
    return torch.cat([levels[..., :first], levels[..., first:] >> 1], dim=-1)


def levels_of(codes: Tensor, first: int, page_tokens: int) -> Tensor:
    """Undo ``stored_codes`` for codes ``[..., T, R]`` from a page's first token on."""
    own = codes[..., first:]
    if not own.shape[-1]:
        return codes
    halves = [changes_of(branches_of(page << 1)) & 1 for page in own.split(page_tokens, dim=-2)]
    return torch.cat([codes[..., :first], own << 1 | torch.cat(halves, dim=-2)], dim=-1)
