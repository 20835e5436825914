"""Choosing a quantiser's scales from a sample of latents."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..codecs import StaticQuantizer
from ..codecs.quantizer import latent_bits
from ..plan import RAW_BITS, BitGroup

# Step of the best uniform quantiser of a unit normal, by bits 1 to 8 (Max 1960, table II).
_NORMAL_STEP = (0.0, 1.596, 0.9957, 0.5860, 0.3352, 0.1881, 0.1041, 0.0569, 0.0308)
# Latents have heavier tails than a normal, so the best step may be a good deal wider.
_FACTORS = torch.linspace(0.7, 2.6, 39)


def fit_quantizer(groups: Sequence[BitGroup], z: Tensor) -> StaticQuantizer:
    """Uniform quantiser about the sample's mean, with the step of least squared error for each latent.

    Args:
        groups: the block's groups of latents.
        z: sample of latents ``[S, R]``, in the groups' order.
    """
    bits = latent_bits(groups)
    mean, spread = z.mean(0), z.std(0).clamp_min(1e-12)
    scale = torch.ones(z.shape[1])
    zero = torch.zeros(z.shape[1])
    for width in sorted(set(bits.tolist())):
        if width == RAW_BITS:
            continue
        own = bits == width
        scale[own] = _best_step((z[:, own] - mean[own]) / spread[own], width) * spread[own]
        zero[own] = mean[own] - scale[own] * (2**width - 1) / 2
    return StaticQuantizer(groups, scale, zero)


def _best_step(unit: Tensor, bits: int) -> Tensor:
    """Step of least squared error for each column of ``unit`` ``[S, R]``, of mean 0 and variance 1."""
    steps = _NORMAL_STEP[bits] * _FACTORS
    top = (2**bits - 1) / 2
    errors = []
    for step in steps:
        level = (unit / step + top).round().clamp(0, 2 * top)
        errors.append(((level - top) * step - unit).square().mean(0))
    return steps[torch.stack(errors).argmin(0)]
