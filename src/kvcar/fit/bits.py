"""Bits for latents by reverse water-filling, in whole bits.

Source: Cover and Thomas, Elements of Information Theory, 10.3.3; whole bits by marginal analysis (Fox 1966), which is
optimal because each further bit gains less than the one before.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Mean squared error of the best uniform quantiser of a unit normal, by bits (Max 1960, table II).
DISTORTION = (1.0, 0.3634, 0.1188, 0.03744, 0.01154, 0.003495, 0.001041, 0.0003035, 0.0000868)


def allocate_bits(variances: Sequence[Tensor], budget_bits: int) -> list[Tensor]:
    """Bits 0 to 8, int64, for every latent of several groups that share a budget.

    Args:
        variances: weighted variance of each latent, one tensor ``[R]`` per group; weights say what an error costs.
        budget_bits: bits per token to spend on all groups together; never exceeded.
    """
    sizes = [len(v) for v in variances]
    flat = torch.cat([v.double() for v in variances])
    steps = torch.tensor(DISTORTION, dtype=torch.float64)
    gains = flat[:, None] * (steps[:-1] - steps[1:])
    budget = min(max(budget_bits, 0), gains.numel())
    bits = torch.zeros(len(flat), dtype=torch.int64)
    if budget:
        order = torch.argsort(gains.flatten(), descending=True, stable=True)[:budget]
        bits += torch.bincount(order // gains.shape[1], minlength=len(flat))
    return list(torch.split(bits, sizes))


def share_latents(gains: Sequence[Tensor], total: int) -> tuple[int, ...]:
    """How many of the first latents of each block are among the ``total`` of highest gain; at least one each.

    Args:
        gains: what each further latent of a block gains, float ``[W]``, falling.
        total: latents to share.
    """
    # A block's first latent is its own; the others compete.
    flat = torch.cat([gain[1:] for gain in gains])
    owner = torch.cat([torch.full((len(gain) - 1,), index) for index, gain in enumerate(gains)])
    best = torch.argsort(flat, descending=True, stable=True)[: total - len(gains)]
    return tuple((1 + torch.bincount(owner[best], minlength=len(gains))).tolist())
