"""The closed form of the linear codec: PCA of a block's normalised vectors, bits by water-filling."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..codecs import LinearCodec, Quantizer
from ..plan import BitGroup
from .moments import Moments
from .quantize import fit_quantizer


@dataclass(frozen=True)
class Basis:
    """Principal directions of a block under a diagonal metric, before any bits are given.

    Attributes:
        mean: ``[W]`` float64.
        metric: ``[W]`` float64; an error of ``metric`` in an element costs 1.
        directions: ``[W, W]`` float64, orthonormal columns by falling variance.
        variances: ``[W]`` float64 of the normalised vectors along the directions.
    """

    mean: Tensor
    metric: Tensor
    directions: Tensor
    variances: Tensor


def principal_basis(moments: Moments) -> Basis:
    """Basis of a block's vectors, each element normalised by its standard deviation."""
    covariance = moments.covariance
    std = covariance.diagonal().clamp_min(1e-12).sqrt()
    variances, directions = torch.linalg.eigh(covariance / torch.outer(std, std))
    return Basis(moments.mean, std, directions.flip(1), variances.flip(0).clamp_min(0))


def groups_of(bits: Tensor) -> tuple[BitGroup, ...]:
    """Groups in falling order of bits; latents with 0 bits are left out."""
    widths, counts = torch.unique(bits[bits > 0], return_counts=True)
    pairs = sorted(zip(widths.tolist(), counts.tolist(), strict=True), reverse=True)
    return tuple(BitGroup(bits=width, count=count) for width, count in pairs)


def linear_codec(basis: Basis, bits: Tensor, sample: Tensor) -> tuple[LinearCodec, Quantizer]:
    """Codec and quantiser for given bits.

    Args:
        basis: the block's basis.
        bits: int64 ``[W]`` for the basis' directions, as ``allocate_bits`` or a raw width gives them.
        sample: vectors ``[S, W]`` to fit the quantiser's steps on.
    """
    order = torch.argsort(bits, descending=True, stable=True)[: int((bits > 0).sum())]
    directions = basis.directions[:, order]
    encoder = (directions / basis.metric[:, None]).float().contiguous()
    decoder = (directions.T * basis.metric).float().contiguous()
    codec = LinearCodec(basis.mean.float(), encoder, decoder)
    return codec, fit_quantizer(groups_of(bits), codec.encode(sample))
