"""Means with standard errors; tokens are taken as independent, as llama.cpp's perplexity tool does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """A figure and its standard error."""

    value: float
    stderr: float

    def exponential(self) -> Estimate:
        """Of the figure's exponential, by the delta method (a mean log-likelihood becomes a perplexity)."""
        value = math.exp(self.value)
        return Estimate(value, value * self.stderr)


def estimate_figures(x: object, names: Sequence[str]) -> dict[str, float]:
    """``name`` and ``name_stderr`` of attributes of ``x`` that are estimates, in this order."""
    figures: dict[str, float] = {}
    for name in names:
        estimate: Estimate = getattr(x, name)
        figures |= {name: estimate.value, f"{name}_stderr": estimate.stderr}
    return figures


def mean_of(x: Tensor) -> Estimate:
    """Mean of ``x`` ``[N]``; the standard error of a single token is not known and said to be NaN."""
    if len(x) < 2:
        return Estimate(float(x.mean()), math.nan)
    return Estimate(float(x.mean()), float(x.std() / math.sqrt(len(x))))


def ratio_of(nll: Tensor, nll_reference: Tensor) -> Estimate:
    """Ratio of two perplexities on the same tokens; pairing the tokens makes its error far smaller than theirs."""
    return mean_of(nll - nll_reference).exponential()
