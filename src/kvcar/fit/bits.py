"""Bits for latents: how many a size leaves, and which latents they help.

Reverse water-filling in whole bits: Cover and Thomas, Elements of Information Theory, 10.3.3; whole bits by marginal
analysis (Fox 1966), which is optimal because each further bit gains less than the one before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ..errors import FitError
from ..geometry import KVGeometry
from ..plan import BitGroup, Plan
from ..sizes import REFERENCE_TOKENS, stored_bytes

# Mean squared error of the best uniform quantiser of a unit normal, by bits (Max 1960, table II).
DISTORTION = (1.0, 0.3634, 0.1188, 0.03744, 0.01154, 0.003495, 0.001041, 0.0003035, 0.0000868)

_PRICE_SEARCHES = 50
T = TypeVar("T")


def kept_share(geometry: KVGeometry, layer: int) -> float:
    """Share of ``REFERENCE_TOKENS`` tokens that a layer keeps: a bit of one that keeps a window costs so much less."""
    return geometry.kept_tokens(layer, REFERENCE_TOKENS) / REFERENCE_TOKENS


def bits_for(plan: Plan, target: float, model_bytes: int) -> int:
    """Bits per token that blocks may spend in all so that the cache is ``target`` times smaller, each times its ``kept_share``.

    Args:
        plan: sinks, window, pages and exact slots as they will be; its blocks say which slots are coded, and their
            own bits do not matter.
        target: wanted times smaller at ``REFERENCE_TOKENS`` tokens.
        model_bytes: bytes of an element that the model computes.

    Raises:
        FitError: what stays exact is already larger than the target allows.
    """
    geometry = plan.geometry
    budget = geometry.full_bytes(REFERENCE_TOKENS) / target
    fixed = stored_bytes(_with_bits(plan, 0), REFERENCE_TOKENS, model_bytes)
    one = stored_bytes(_with_bits(plan, 8), REFERENCE_TOKENS, model_bytes) - fixed
    shares = [kept_share(geometry, block.slots[0].layer) for block in plan.blocks]
    latents = sum(len(b.slots) * share for b, share in zip(plan.blocks, shares, strict=True)) * geometry.head_dim
    # Padding of a page's segments to whole 16 bytes is the only part that is not proportional.
    spare = 16 * 8 * len(plan.blocks) / plan.page_tokens
    bits = int((budget - fixed) / one * 8 * latents - spare)
    if bits < 1:
        reach = geometry.full_bytes(REFERENCE_TOKENS) / fixed
        raise FitError(
            f"{target:g} times smaller is out of reach: sinks, window and layers kept exact alone allow no more than "
            f"{reach:.1f} times at {REFERENCE_TOKENS} tokens; ask for less, or for a smaller window"
        )
    return bits


def _with_bits(plan: Plan, bits: int) -> Plan:
    """The plan with every element of its blocks at ``bits`` bits (0: as good as none)."""
    blocks = []
    for block in plan.blocks:
        width = len(block.slots) * plan.geometry.head_dim
        count, each = (width, bits) if bits else (1, 1)
        blocks.append(block.model_copy(update={"groups": (BitGroup(bits=each, count=count),)}))
    return plan.model_copy(update={"blocks": tuple(blocks)})


def allocate_bits(
    variances: Sequence[Tensor], budget_bits: int, kept_shares: Sequence[float] | None = None
) -> list[Tensor]:
    """Bits 0 to 8, int64, for every latent of several groups that share a budget.

    Args:
        variances: weighted variance of each latent, one tensor ``[R]`` per group; weights say what an error costs.
        budget_bits: bits per token to spend on all groups together; never exceeded.
        kept_shares: what a bit of each group counts; None for 1.
    """
    sizes = [len(v) for v in variances]
    flat, shares = torch.cat([v.double() for v in variances]), _of_latents(kept_shares, sizes)
    steps = torch.tensor(DISTORTION, dtype=torch.float64)
    gains = flat[:, None] * (steps[:-1] - steps[1:]) / shares[:, None]
    order = torch.argsort(gains.flatten(), descending=True, stable=True)
    spent = shares[order // gains.shape[1]].cumsum(0)
    order = order[spent <= max(budget_bits, 0) + 1e-6]
    bits = torch.bincount(order // gains.shape[1], minlength=len(flat))
    return list(torch.split(bits, sizes))


def _of_latents(each: Sequence[float] | None, sizes: Sequence[int]) -> Tensor:
    """A number of every group for each of its latents, float64; 1 where there is none."""
    numbers = [1.0] * len(sizes) if each is None else each
    return torch.cat([torch.full((n,), own, dtype=torch.float64) for n, own in zip(sizes, numbers, strict=True)])


def bits_at_price(variances: Tensor, price: Tensor | float, latent_cost: Tensor | float = 0.0) -> Tensor:
    """Bits 0 to 8, int64 ``[R]``, of latents whose error costs half their variance times the quantiser's distortion.

    ``latent_cost`` is what a latent costs that has any bits at all.
    """
    steps = torch.tensor(DISTORTION, dtype=torch.float64)
    own = price[:, None] if isinstance(price, Tensor) else price
    costs = 0.5 * variances.double()[:, None] * steps + own * torch.arange(len(steps))
    costs[:, 1:] += latent_cost[:, None] if isinstance(latent_cost, Tensor) else latent_cost
    return costs.argmin(1)


def error_of(variances: Tensor, bits: Tensor) -> float:
    """What the errors cost: half the sum of variance times distortion, nats under an effect metric."""
    return 0.5 * float((variances.double() * torch.tensor(DISTORTION, dtype=torch.float64)[bits]).sum())


def price_for(variances: Sequence[Tensor], budget_bits: float, kept_shares: Sequence[float] | None = None) -> float:
    """Price of a bit at which latents of all blocks together take about ``budget_bits``, each bit times its ``kept_share``."""
    flat, shares = torch.cat([v.double() for v in variances]), _of_latents(kept_shares, [len(v) for v in variances])
    steps = torch.tensor(DISTORTION, dtype=torch.float64)
    gains, order = (0.5 * flat[:, None] * (steps[:-1] - steps[1:]) / shares[:, None]).flatten().sort(descending=True)
    spent = shares[order // (len(steps) - 1)].cumsum(0)
    kept = int((spent <= max(int(budget_bits), 1) + 1e-6).sum())
    return float(gains[max(kept, 1) - 1])


def lowest_price(at: Callable[[float], tuple[T, float]], budget: float | None, highest: float = 1.0) -> T:
    """What ``at`` gives at the lowest price for which what it spends keeps to the budget; at ``highest`` if none does."""
    free, spent = at(0.0)
    if budget is None or spent <= budget:
        return free
    low, high = 1e-18, highest
    for _ in range(_PRICE_SEARCHES):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if at(middle)[1] <= budget else (middle, high)
    return at(high)[0]


def allocate_priced_bits(
    variances: Sequence[Tensor],
    codec_bits: Sequence[float],
    flops_per_latent: Sequence[float],
    budget_bits: int,
    flops_budget: float | None,
    kept_shares: Sequence[float] | None = None,
) -> list[Tensor]:
    """Bits 0 to 8, int64, for every latent of several blocks that share budgets of bits and of FLOPs per token.

    Args:
        variances: weighted variance of each latent, ``[R]`` for every block.
        codec_bits: bits per token that its row of the codec is worth, for a latent of the block that has any bits; they are
            weighed, and not part of the budget.
        flops_per_latent: what such a latent costs.
        budget_bits, flops_budget: never exceeded, unless even one bit in all takes more FLOPs; None for no limit on those.
        kept_shares: what a bit of each block counts; None for 1.
    """
    flat = torch.cat([v.double() for v in variances])
    sizes = [len(v) for v in variances]
    rows, flops, shares = (_of_latents(each, sizes) for each in (codec_bits, flops_per_latent, kept_shares))

    def at(flops_price: float) -> tuple[Tensor, float]:
        def bits_at(price: float) -> tuple[Tensor, float]:
            bits = bits_at_price(flat, price * shares, flops_price * flops + price * rows)
            return bits, float((bits * shares).sum())

        bits = lowest_price(bits_at, budget_bits, highest=float((flat / shares).max()))
        return bits, float(flops[bits > 0].sum())

    return list(lowest_price(at, flops_budget).split([len(v) for v in variances]))


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
