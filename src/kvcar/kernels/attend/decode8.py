"""Decoders of keys rounded to 8 bits for the C kernel, which multiplies them with codes in integers.

Codes are small integers already, so only the decoder is rounded, for every element of a head to its own step. Latents
of many bits have large codes, under which that error would show; they stay in float. What the rounding does to the middle code
of each latent goes into the bias. What is left is a few hundredths of the codes' own rounding noise.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...layout import SegmentLayout

FEWEST_FLOAT_BITS = 8
_LARGEST_SUM = 2**15 - 1


class Decoder8(NamedTuple):
    """A decoder for codes ``u``: ``u[:exact] @ matrix + (u[exact:] @ rounded) * scale + bias``.

    Attributes:
        exact: leading latents that stay in float.
        rounded: int8 ``[R - exact, D]``.
        scale, bias: float32 ``[D]``.
        stops: pairs of latents, counted from ``exact`` on, after which sums of 16 bits must be widened; the last is all.
    """

    exact: int
    rounded: Tensor
    scale: Tensor
    bias: Tensor
    stops: list[int]


def latent_bits(segment: SegmentLayout) -> Tensor:
    """Bits of every latent of a segment without raw ones, int64 ``[R]``."""
    bits = torch.zeros(segment.latents, dtype=torch.int64)
    for plane in segment.planes:
        bits[plane.start : plane.stop] += plane.bits
    return bits


def decoder_in_8_bits(matrix: Tensor, bias: Tensor, bits: Tensor) -> Decoder8:
    """Round the decoder ``[R, D]`` of one head; ``bits`` int64 ``[R]`` fall.

    Returns:
        The decoder; latents of ``FEWEST_FLOAT_BITS`` bits or more are exact.
    """
    exact = int((bits >= FEWEST_FLOAT_BITS).sum())
    own, highest = matrix[exact:].float(), 2.0 ** bits[exact:].float() - 1
    scale = (own.abs().amax(0) if len(own) else own.new_zeros(own.shape[1])).clamp_min(1e-20) / 127
    rounded = (own / scale).round().clamp(-127, 127)
    middle = (highest / 2) @ (own - rounded * scale)
    return Decoder8(exact, rounded.to(torch.int8), scale, bias.float() + middle, _stops(rounded, highest))


def _stops(rounded: Tensor, highest: Tensor) -> list[int]:
    """After which pairs to widen, so that no sum of codes up to ``highest`` leaves 16 bits, whatever the codes."""
    if len(rounded) % 2:
        rounded, highest = (
            torch.cat([rounded, rounded.new_zeros(1, rounded.shape[1])]),
            torch.cat([highest, highest[:1]]),
        )
    reach = (rounded * highest[:, None]).unflatten(0, (-1, 2))
    up, down = reach.clamp_min(0).sum(1), (-reach).clamp_min(0).sum(1)
    stops, most = [], torch.zeros(2, rounded.shape[1])
    for pair, own in enumerate(torch.stack([up, down], 1)):
        if float((most + own).max()) > _LARGEST_SUM:
            stops.append(pair)
            most = torch.zeros_like(most)
        most = most + own
    return [*stops, len(reach)]
