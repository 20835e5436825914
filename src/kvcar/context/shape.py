"""The discretised logistic distribution that codes are expected to have, bit by bit the same on every machine.

Exponentials come from ``decimal``, which rounds correctly everywhere; all else is a single IEEE operation at a time.
"""

from __future__ import annotations

import math
from decimal import Decimal, localcontext
from functools import cache
from typing import Any

import numpy as np

Floats = np.ndarray[Any, np.dtype[np.float64]]
Integers = np.ndarray[Any, np.dtype[np.int64]]

FIXED = 1024
"""Mean absolute deviations are whole numbers of 1/1024 code."""

_STEPS_PER_UNIT, _UNITS = 16, 20
_SCALES, _SCALES_PER_DOUBLING, _SMALLEST_SCALE = 192, 16, Decimal(1) / 16
_MOST_CODES = 1024


@cache
def _logistic() -> Floats:
    """The distribution function at 0, 1/16, 2/16, ... 20 and once more at the end."""
    with localcontext(prec=28):
        exact = [1 / (1 + (-Decimal(i) / _STEPS_PER_UNIT).exp()) for i in range(_STEPS_PER_UNIT * _UNITS + 1)]
    return np.array([float(x) for x in [*exact, exact[-1]]])


@cache
def _scales() -> tuple[Floats, Integers]:
    """Scales of the distribution, 16 per doubling, and the mean absolute code that each one gives, in ``FIXED``."""
    with localcontext(prec=28):
        doublings = [Decimal(2) ** (Decimal(k) / _SCALES_PER_DOUBLING) for k in range(_SCALES)]
    scales = np.array([float(_SMALLEST_SCALE * d) for d in doublings])
    halves = np.arange(_MOST_CODES) + 0.5
    means = []
    for scale in scales:
        tails = 1.0 - _distribution(halves / scale)
        # Rounded once: a plain sum differs between versions of Python.
        means.append(int(2 * FIXED * math.fsum(tails.tolist())))
    return scales, np.array(means, dtype=np.int64)


def _distribution(u: Floats) -> Floats:
    """The logistic distribution function, straight between the table's places."""
    table = _logistic()
    place = np.minimum(np.abs(u) * _STEPS_PER_UNIT, float(_STEPS_PER_UNIT * _UNITS))
    index = place.astype(np.int64)
    low = table[index]
    upper = low + (place - index) * (table[index + 1] - low)
    return np.where(u < 0, 1.0 - upper, upper)


def code_probabilities(levels: int, centre_quarters: Integers, deviation: Integers) -> Floats:
    """Probabilities ``[n, C, levels]`` of codes.

    Args:
        levels: codes run from 0 to ``levels - 1``.
        centre_quarters: ``[n]``, where the distribution is centred, in quarters of a code.
        deviation: ``[n, C]``, wanted mean distance from the centre, in ``FIXED``.
    """
    scales, means = _scales()
    scale = scales[np.minimum(np.searchsorted(means, deviation), len(scales) - 1)]
    edges = np.arange(1, levels) - 0.5 - centre_quarters[:, None] / 4
    inner = _distribution(edges[:, None, :] / scale[:, :, None])
    ends = np.zeros((*inner.shape[:2], 1))
    return np.diff(np.concatenate([ends, inner, ends + 1.0], axis=-1), axis=-1)
