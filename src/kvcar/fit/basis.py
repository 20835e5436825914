"""The closed form of the linear codec: PCA of a block under a metric, and quantisers fitted on a sample of its latents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..codecs import Linear8Codec, LinearCodec, Quantizer, RoundedMetric, StaticQuantizer, TrellisQuantizer
from ..codecs.quantizer import latent_bits
from ..plan import MOST_TRELLIS_BITS, RAW_BITS, BitGroup

FEWEST_EXACT_BITS, FEWEST_STRONG_BITS = 8, 6
"""Latents of as many bits and more keep their decoder in 16 bits, or are taken out of the others when encoding."""

# Step of the best uniform quantiser of a unit normal, by bits 1 to 8 (Max 1960, table II).
_NORMAL_STEP = (0.0, 1.596, 0.9957, 0.5860, 0.3352, 0.1881, 0.1041, 0.0569, 0.0308)
# Latents have heavier tails than a normal, so the best step may be a good deal wider.
_FACTORS = torch.linspace(0.7, 2.6, 39, dtype=torch.float32)


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
        variances, directions = torch.linalg.eigh(times_blocks(blocks_times(roots, covariance), roots))
        encoder, decoder = blocks_times(roots, directions), times_blocks(directions.T, inverses)
    return Basis(mean, std, encoder.flip(1), decoder.flip(0), variances.flip(0).clamp_min(0))


def blocks_times(blocks: Sequence[Tensor], x: Tensor) -> Tensor:
    """Multiply ``x`` ``[W, N]`` from the left by square matrices that follow each other on a diagonal, zeros left out."""
    parts = x.split([len(block) for block in blocks])
    return torch.cat([block @ part for block, part in zip(blocks, parts, strict=True)])


def times_blocks(x: Tensor, blocks: Sequence[Tensor]) -> Tensor:
    """Multiply ``x`` ``[N, W]`` by the same from the right."""
    parts = x.split([len(block) for block in blocks], dim=1)
    return torch.cat([part @ block for block, part in zip(blocks, parts, strict=True)], dim=1)


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


def linear8_codec(
    basis: Basis,
    bits: Tensor,
    sample: Tensor,
    metrics: Sequence[RoundedMetric],
    head_dim: int,
    trellis: int | None = None,
) -> tuple[Linear8Codec, Quantizer]:
    """Codec in 8 bits and quantiser for given bits; ``metrics`` are those that the basis was made for.

    ``trellis``: tokens that one runs over, None for whole steps. Its best steps are those of whole ones, halved.
    """
    order = torch.argsort(bits, descending=True, stable=True)[: int((bits > 0).sum())]
    own, groups = bits[order], groups_of(bits)
    steps = fit_quantizer(groups, ((sample.double() - basis.mean) @ basis.encoder[:, order]).float()).scale
    if trellis is not None:
        steps[own <= MOST_TRELLIS_BITS] /= 2
    return in_8_bits(basis.mean, basis.decoder[order] * steps[:, None], own, sample, metrics, head_dim, trellis)


def in_8_bits(
    mean: Tensor,
    decoder: Tensor,
    bits: Tensor,
    sample: Tensor,
    metrics: Sequence[RoundedMetric],
    head_dim: int,
    trellis: int | None = None,
) -> tuple[Linear8Codec, Quantizer]:
    """Round a decoder ``[R, W]`` of codes of falling ``bits``; codes are those of the rounded one, about the sample's mean."""
    exact, strong = (int((bits >= fewest).sum()) for fewest in (FEWEST_EXACT_BITS, FEWEST_STRONG_BITS))
    codec = Linear8Codec.rounded(mean, decoder, metrics, head_dim, exact, strong)
    middle = codec.encode(sample).mean(0)
    levels = bits if trellis is None else bits + (bits <= MOST_TRELLIS_BITS)
    zero, one = (middle - (2.0 ** levels.float() - 1) / 2).float(), torch.ones(len(bits), dtype=torch.float32)
    groups = groups_of(bits)
    return codec, StaticQuantizer(groups, one, zero) if trellis is None else TrellisQuantizer(
        groups, one, zero, trellis
    )


def fit_quantizer(groups: Sequence[BitGroup], z: Tensor) -> StaticQuantizer:
    """Uniform quantiser about the sample's mean, with the step of least squared error for each latent.

    Args:
        groups: the block's groups of latents.
        z: sample of latents ``[S, R]``, in the groups' order.
    """
    bits = latent_bits(groups)
    mean, spread = z.mean(0), z.std(0).clamp_min(1e-12)
    scale = torch.ones(z.shape[1], dtype=torch.float32)
    zero = torch.zeros(z.shape[1], dtype=torch.float32)
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
