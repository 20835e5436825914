"""TurboQuant: rotate each vector at random, quantise every coordinate with the best scalar quantiser, keep the norm.

Source: "TurboQuant: Online Vector Quantization with Near-optimal Distortion Rate", arXiv 2504.19874, its first
algorithm (least squared error). A coordinate of a random point on the unit sphere in ``d`` dimensions has density
proportional to ``(1 - x^2)^((d - 3) / 2)``; the codebook is that density's Lloyd-Max quantiser. The norm is stored in 16
bits. Nothing is fitted on text. The paper's second algorithm (one bit of the residual, for unbiased products) and its
split into outlier channels for fractional bits are not here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvcar.geometry import Kind

from .base import Method
from .registry import BASELINES
from .stored import Codes, Stored, to_half

_GRID_POINTS = 200_001
_MOST_ROUNDS = 3000
_SETTLED = 1e-9


def sphere_codebook(bits: int, dimension: int) -> Tensor:
    """Levels float64 ``[2**bits]`` of the Lloyd-Max quantiser of one coordinate of a random unit vector."""
    x = torch.linspace(-1, 1, _GRID_POINTS, dtype=torch.float64)
    return lloyd_max(x, (1 - x.square()).clamp_min(0) ** ((dimension - 3) / 2), 2**bits)


def lloyd_max(x: Tensor, density: Tensor, levels: int) -> Tensor:
    """Levels of least squared error for a density given on a fine grid.

    Source: Lloyd, "Least squares quantization in PCM" (1982); Max (1960).

    Args:
        x: grid float64 ``[G]``, rising.
        density: at the grid's points, not normalised.
        levels: how many.
    """
    mass = torch.cat([density.new_zeros(1), density.cumsum(0)])
    moment = torch.cat([density.new_zeros(1), (density * x).cumsum(0)])
    quantiles = (torch.arange(levels, dtype=torch.float64) + 0.5) / levels * mass[-1]
    centres = x[torch.searchsorted(mass[1:], quantiles)]
    for _ in range(_MOST_ROUNDS):
        middle = torch.searchsorted(x, (centres[:-1] + centres[1:]) / 2)
        edges = torch.cat([middle.new_zeros(1), middle, middle.new_full((1,), len(x))])
        moved = (moment[edges].diff()) / mass[edges].diff().clamp_min(1e-300)
        if (moved - centres).abs().max() < _SETTLED:
            return moved
        centres = moved
    return centres


def random_rotation(dimension: int, seed: int) -> Tensor:
    """A random orthogonal matrix, float32 ``[D, D]``, uniform over all of them."""
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(dimension, dimension, generator=generator, dtype=torch.float64))
    return (q * r.diagonal().sign()).float()


class TurboQuant(Method):
    """TurboQuant at ``bits`` per coordinate of a head's vector of ``head_dim``."""

    family = "TurboQuant"

    def __init__(self, bits: int, head_dim: int, seed: int = 0) -> None:
        self.bits = bits
        self.rotation = random_rotation(head_dim, seed)
        self.levels = sphere_codebook(bits, head_dim).float()
        self._borders = (self.levels[:-1] + self.levels[1:]) / 2
        self.config = {"bits": bits, "seed": seed}

    def encode(self, kind: Kind, x: Tensor) -> Stored:
        """See ``Method``."""
        del kind
        norm = to_half(x.norm(dim=-1, keepdim=True))
        unit = x / norm.float().clamp_min(1e-12)
        codes = torch.bucketize(unit @ self.rotation.T, self._borders)
        return Stored((Codes(codes, self.bits),), (norm,))

    def decode(self, kind: Kind, stored: Stored) -> Tensor:
        """See ``Method``."""
        del kind
        return self.levels[stored.codes[0].values] @ self.rotation * stored.halves[0].float()


def _register(bits: int) -> None:
    BASELINES.register(f"turboquant-{bits}bit")(lambda c: TurboQuant(bits, c.geometry.head_dim))


for _bits in (4, 3, 2):
    _register(_bits)
