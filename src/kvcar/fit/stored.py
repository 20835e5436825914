"""The profile for stored contexts: uniform steps and an entropy coder instead of whole bits for every latent.

Under the effect metric an error in any latent costs the same, so one step serves all of them, and the entropy coder gives each
the bits that it needs, fractions included (entropy-coded scalar quantisation: Gish and Pierce 1968). In memory codes take
whole bits as usual; on disk (``KVCarCache.save``) they take their entropy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..bundle import CodedBlock
from ..codecs import LinearCodec, StaticQuantizer
from ..context.entropy import entropy_bits_per_token
from ..errors import FitError
from .solve import Basis, groups_of
from ..plan import Plan
from .budget import REFERENCE_TOKENS
from ..progress import OnProgress
from ..geometry import BFLOAT16_BYTES
from .search import Solved, bases_of
from .statistics import Statistics

_MOST_LEVELS = 255
_SEARCHES = 24
_UNSEEN = 1.03
"""Codes of text that was not fitted on take about this much more."""


def solve_stored(statistics: Statistics, plan: Plan, times_smaller: float, on_progress: OnProgress) -> Solved:
    """Codecs whose codes take, entropy-coded, ``times_smaller`` times fewer bytes than the full cache at 4,096 tokens.

    Raises:
        FitError: what stays exact is already larger than the target allows.
    """
    bases = bases_of(statistics, plan, on_progress)
    latents = [
        ((statistics.sample(block.slots).double() - basis.mean) @ basis.encoder)
        for block, basis in zip(plan.blocks, bases, strict=True)
    ]
    step = _step_for(latents, _bits_per_token(plan, times_smaller) / _UNSEEN)
    coded, blocks, predicted = [], [], 0.0
    for block, basis, z in zip(plan.blocks, bases, latents, strict=True):
        own, groups, error = _code(basis, z, step)
        coded.append(own)
        blocks.append(block.model_copy(update={"groups": groups}))
        predicted += 0.5 * error
    return Solved(plan.model_copy(update={"blocks": tuple(blocks)}), tuple(coded), predicted)


def _bits_per_token(plan: Plan, times_smaller: float) -> float:
    """What a token's codes may take on disk when sinks are stored exactly."""
    geometry = plan.geometry
    exact = plan.sinks * geometry.layer_elements_per_token * len(plan.coded_layers) * BFLOAT16_BYTES
    plain = geometry.layers - len(plan.coded_layers)
    kept = 0 if not plain else geometry.full_bytes(REFERENCE_TOKENS) * plain // geometry.layers
    budget = geometry.full_bytes(REFERENCE_TOKENS) / times_smaller - exact - kept
    if budget <= 0:
        raise FitError(
            f"{times_smaller:g} times smaller is out of reach: sinks and layers kept exact alone take more; ask for less"
        )
    return 8 * budget / (REFERENCE_TOKENS - plan.sinks)


def _step_for(latents: list[Tensor], budget_bits: float) -> float:
    """The step at which all blocks' codes together have this entropy."""
    low, high = 1e-6, float(max(z.abs().max() for z in latents)) * 2
    for _ in range(_SEARCHES):
        step = (low * high) ** 0.5
        entropy = sum(entropy_bits_per_token(_codes(z, step)) for z in latents)
        low, high = (step, high) if entropy > budget_bits else (low, step)
    return high


def _codes(z: Tensor, step: float) -> Tensor:
    codes = (z / step).round().long()
    return codes - codes.amin(0)


def _code(basis: Basis, z: Tensor, step: float) -> tuple[CodedBlock, tuple, float]:
    """Codec, groups and squared error of a block at a step: latents that are always 0 are left out."""
    rounded = (z / step).round()
    # Room for a third more than the sample showed; beyond it values are clipped.
    half = (rounded.abs().amax(0) * 1.34).ceil().clamp(max=(_MOST_LEVELS - 1) // 2)
    bits = torch.where(half > 0, (2 * half + 1).log2().ceil(), 0).long()
    if not int(bits.sum()):
        bits[0] = 1
    order = torch.argsort(bits, descending=True, stable=True)[: int((bits > 0).sum())]
    groups = groups_of(bits)
    # What a code stands for, by least squares: cells are wide, and the mass in them lies nearer to 0.
    stands = (z * rounded).sum(0) / (rounded.square().sum(0) * step).clamp_min(1e-12)
    stands = stands.clamp(0.5, 1.5)
    encoder = basis.encoder[:, order].float().contiguous()
    decoder = (basis.decoder * stands[:, None])[order].float().contiguous()
    levels = 2.0 ** bits[order]
    scale = torch.full((len(order),), step)
    quantizer = StaticQuantizer(groups, scale, (-scale * (levels / 2).floor()).float())
    kept = bits > 0
    error = torch.where(kept, (rounded * step * stands - z).square().mean(0), z.square().mean(0))
    return CodedBlock(LinearCodec(basis.mean.float(), encoder, decoder), quantizer), groups, float(error.sum())
