"""The search in Triton: a program for some latents of a page, all tokens of which it goes through twice.

Imported by the registry when the backend is asked for, as it needs the extra ``kvcar[triton]``.
"""
# pyright: basic, reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false
# No "from __future__ import annotations": Triton reads the annotations of jitted functions.

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_unpack import cannot_run_on
from .search import SEARCH

_LATENTS = 64
_WARPS = 2
_UNREACHED = tl.constexpr(1e30)


def unsupported(targets: Tensor, highest: Tensor, states: Tensor | None) -> str | None:
    """Say why ``search`` cannot take these inputs, or None if it can."""
    del highest, states
    return cannot_run_on(targets.device.type)


@SEARCH.register("triton", unsupported=unsupported)
def search(targets: Tensor, highest: Tensor, states: Tensor | None) -> Tensor:
    """Compute the same as ``search.search``, but for ties."""
    targets, highest = targets.contiguous(), highest.contiguous()
    pages, tokens, latents = targets.shape
    levels, ways = torch.empty_like(targets), torch.empty(targets.shape, dtype=torch.uint8, device=targets.device)
    if targets.numel():
        begun = ways if states is None else states.contiguous()
        with torch.cuda.device_of(targets):
            search_latents[pages, triton.cdiv(latents, _LATENTS)](
                levels, targets, highest, begun, ways, tokens, latents, BEGUN=states is not None, BLOCK=_LATENTS, num_warps=_WARPS
            )  # fmt: skip
    return levels


@triton.jit
def _nearest(target, lowest, highest):
    """The level nearest to a target that has ``lowest`` for its two lowest bits."""
    quarters = tl.floor(tl.maximum((target - lowest) * 0.25 + 0.5, 0.0))
    return 4 * tl.minimum(quarters, tl.floor((highest - lowest) * 0.25)) + lowest


@triton.jit
def search_latents(levels, targets, highest, states, ways, tokens, latents, BEGUN: tl.constexpr, BLOCK: tl.constexpr):
    """Search for one block of latents of a page.

    A step takes 16 ways: of branches (x3, x2, x1) that made the state and x that is new, the highest digit first. The states that
    they lead to are (x2, x1, x), so that those of x3 = 0 and 1 are the halves.

    Args:
        levels: float32 ``[pages, tokens, latents]``, written.
        targets: float32 of the same shape; highest: float32 ``[latents]``; states: uint8 ``[pages, latents]`` where BEGUN.
        ways: uint8 ``[pages, tokens, latents]``, written: of every state whether the one with x3 = 1 led there.
    """
    page = tl.program_id(0).to(tl.int64)
    latent = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = latent < latents
    top = tl.load(highest + latent, mask=there, other=3.0)
    begin = tl.zeros([BLOCK], tl.int32)
    if BEGUN:
        begin = tl.load(states + page * latents + latent, mask=there, other=0).to(tl.int32)
    state_of = tl.arange(0, 8)
    cost = tl.where(state_of[:, None] == begin[None, :], 0.0, _UNREACHED)
    way = tl.arange(0, 16)
    lowest = (2 * ((way ^ (way >> 1) ^ (way >> 3)) & 1) + ((way >> 2) & 1)).to(tl.float32)
    own = page * tokens * latents + latent
    token = 0
    while token < tokens:
        target = tl.load(targets + own + token * latents, mask=there, other=0.0)
        error = _nearest(target[None, :], lowest[:, None], top[None, :]) - target[None, :]
        both = tl.reshape(tl.broadcast_to(cost[:, None, :], [8, 2, BLOCK]), [16, BLOCK]) + error * error
        zero, one = tl.split(tl.permute(tl.reshape(both, [2, 8, BLOCK]), (1, 2, 0)))
        better = tl.sum((one < zero).to(tl.int32) << state_of[:, None], 0)
        tl.store(ways + own + token * latents, better.to(tl.uint8), mask=there)
        cost = tl.minimum(zero, one)
        token += 1
    tl.debug_barrier()  # what is read now others may have written
    state = tl.argmin(cost, 0).to(tl.int32)
    while token > 0:
        token -= 1
        third = (tl.load(ways + own + token * latents, mask=there, other=0).to(tl.int32) >> state) & 1
        bits = 2 * ((state ^ (state >> 1) ^ third) & 1) + ((state >> 2) & 1)
        target = tl.load(targets + own + token * latents, mask=there, other=0.0)
        tl.store(levels + own + token * latents, _nearest(target, bits.to(tl.float32), top), mask=there)
        state = (state >> 1) | (third << 2)
