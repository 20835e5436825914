"""Asymmetric uniform quantisation between a group's least and greatest element, as several methods use it."""

from __future__ import annotations

from torch import Tensor

from .stored import to_half

# The smallest step that stays normal in float16.
_SMALLEST_STEP = 2.0**-14


def quantise(x: Tensor, bits: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes int64 like ``x``, and each group's step and least element in float16; a group lies along ``dim``.

    Codes are computed against the rounded step and least element, which are what decoding has.
    """
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    levels = 2**bits - 1
    step = to_half(((high - low) / levels).clamp_min(_SMALLEST_STEP))
    least = to_half(low)
    codes = ((x - least.float()) / step.float()).round().clamp(0, levels)
    return codes.long(), step, least


def dequantise(codes: Tensor, step: Tensor, least: Tensor) -> Tensor:
    """Float32 of codes and their group's step and least element."""
    return codes * step.float() + least.float()
