"""Codecs for stored contexts: uniform steps and an entropy coder instead of whole bits for every latent.

Under the effect metric an error in any latent costs the same, so one step fits all of them, and the entropy coder gives each
the bits that it needs, fractions included (entropy-coded scalar quantisation: Gish and Pierce 1968). In memory codes take
whole bits as usual; on disk (``KVCarCache.save``) they take their entropy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from ..bundle import CodedBlock
from ..codecs import Linear8Codec, RoundedMetric, StaticQuantizer
from ..context.entropy import entropy_bits_per_token
from ..errors import FitError
from ..geometry import BFLOAT16_BYTES
from ..plan import BitGroup, Plan
from ..sizes import REFERENCE_TOKENS
from .basis import FEWEST_EXACT_BITS, FEWEST_STRONG_BITS, Basis, groups_of

_MAX_LEVELS = 255
_SEARCHES = 24
_UNSEEN = 1.03
"""Codes of text that was not fitted on take about this much more."""


def solve_entropy_coded(
    bases: Sequence[Basis],
    metrics: Iterable[Sequence[RoundedMetric]],
    samples: Iterable[Tensor],
    bits_per_token: float,
    head_dim: int,
) -> Iterator[tuple[tuple[BitGroup, ...], CodedBlock, float]]:
    """Groups, codec and expected divergence of every block, whose codes together have the entropy that was asked for.

    Args:
        bases: of every block, under the effect metric.
        metrics: of every block, those that its basis is of.
        samples: vectors float32 ``[S, W]`` of every block.
        bits_per_token: entropy of all blocks' codes.
        head_dim: elements of a slot.
    """
    latents = [(x.double() - basis.mean) @ basis.encoder for x, basis in zip(samples, bases, strict=True)]
    step = _step_for(latents, bits_per_token)
    for basis, own, z in zip(bases, metrics, latents, strict=True):
        yield _code(basis, own, z, step, head_dim)


def stored_bits_per_token(plan: Plan, times_smaller: float) -> float:
    """Entropy that a token's codes may have so that a context on disk, sinks exact, is ``times_smaller`` at 4,096 tokens.

    Raises:
        FitError: what stays exact is already larger than the target allows.
    """
    geometry = plan.geometry
    exact = plan.sinks * geometry.layer_elements_per_token * len(plan.coded_layers) * BFLOAT16_BYTES
    others = set(range(geometry.layers)) - set(plan.coded_layers)
    kept = sum(geometry.kept_elements(layer, REFERENCE_TOKENS) for layer in others) * BFLOAT16_BYTES
    budget = geometry.full_bytes(REFERENCE_TOKENS) / times_smaller - exact - kept
    if budget <= 0:
        raise FitError(
            f"{times_smaller:g} times smaller is out of reach: sinks and layers kept exact alone take more; ask for less"
        )
    return 8 * budget / (REFERENCE_TOKENS - plan.sinks) / _UNSEEN


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


def _code(
    basis: Basis, metrics: Sequence[RoundedMetric], z: Tensor, step: float, head_dim: int
) -> tuple[tuple[BitGroup, ...], CodedBlock, float]:
    """Groups, codec and expected divergence of a block at a step: latents that are always 0 are left out."""
    rounded = (z / step).round()
    # Room for a third more than the sample showed; beyond it values are clipped.
    half = (rounded.abs().amax(0) * 1.34).ceil().clamp(max=(_MAX_LEVELS - 1) // 2)
    bits = torch.where(half > 0, (2 * half + 1).log2().ceil(), 0).long()
    if not int(bits.sum()):
        bits[0] = 1
    order = torch.argsort(bits, descending=True, stable=True)[: int((bits > 0).sum())]
    groups = groups_of(bits)
    # What a code stands for, by least squares: cells are wide, and the mass in them lies nearer to 0.
    stands = (z * rounded).sum(0) / (rounded.square().sum(0) * step).clamp_min(1e-12)
    stands = stands.clamp(0.5, 1.5)
    own = bits[order]
    decoder = basis.decoder[order] * (step * stands[order])[:, None]
    exact, strong = (int((own >= fewest).sum()) for fewest in (FEWEST_EXACT_BITS, FEWEST_STRONG_BITS))
    codec = Linear8Codec.rounded(basis.mean, decoder, metrics, head_dim, exact, strong)
    codec.gain = stands[order].float()
    quantizer = StaticQuantizer(groups, torch.ones(len(order), dtype=torch.float32), -(2.0 ** own.float() / 2).floor())
    kept = bits > 0
    error = torch.where(kept, (rounded * step * stands - z).square().mean(0), z.square().mean(0))
    return groups, CodedBlock(codec, quantizer), 0.5 * float(error.sum())
