"""The closed form of the linear codec: PCA of a block under a metric, bits by water-filling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..codecs import LinearCodec, Quantizer
from ..plan import BitGroup
from .quantize import fit_quantizer


@dataclass(frozen=True)
class Basis:
    """Uncorrelated directions of a block under a metric, before any bits are given: ``z = (x - mean) @ encoder``.

    Attributes:
        mean: ``[W]`` float64.
        std: ``[W]`` float64, standard deviation of each element.
        encoder: ``[W, W]`` float64, columns by falling variance.
        decoder: ``[W, W]`` float64, its inverse.
        variances: ``[W]`` float64 of ``z``; an error of 1 in any ``z`` costs the same.
    """

    mean: Tensor
    std: Tensor
    encoder: Tensor
    decoder: Tensor
    variances: Tensor


def principal_basis(mean: Tensor, covariance: Tensor, metrics: Sequence[Tensor] | None = None) -> Basis:
    """Basis of a block's vectors.

    Args:
        mean, covariance: of the block, float64 ``[W]`` and ``[W, W]``.
        metrics: what errors cost, positive definite float64 matrices ``[w, w]`` that follow each other on the diagonal;
            without, each element is normalised by its standard deviation.
    """
    std = covariance.diagonal().clamp_min(1e-12).sqrt()
    if metrics is None:
        variances, directions = torch.linalg.eigh(covariance / torch.outer(std, std))
        encoder, decoder = directions / std[:, None], directions.T * std
    else:
        roots, inverses = zip(*(_square_roots(metric) for metric in metrics), strict=True)
        root, inverse = torch.block_diag(*roots), torch.block_diag(*inverses)
        variances, directions = torch.linalg.eigh(root @ covariance @ root)
        encoder, decoder = root @ directions, directions.T @ inverse
    return Basis(mean, std, encoder.flip(1), decoder.flip(0), variances.flip(0).clamp_min(0))


def _square_roots(metric: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric square root of a positive definite matrix, and its inverse."""
    values, vectors = torch.linalg.eigh(metric)
    root = values.clamp_min(values[-1] * 1e-12).sqrt()
    return (vectors * root) @ vectors.T, (vectors / root) @ vectors.T


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
    encoder = basis.encoder[:, order].float().contiguous()
    decoder = basis.decoder[order].float().contiguous()
    codec = LinearCodec(basis.mean.float(), encoder, decoder)
    return codec, fit_quantizer(groups_of(bits), codec.encode(sample))
