"""Figures from timings: spreads, straight lines over the context length, where two lines cross."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import mean, median, quantiles
from typing import Literal

Sooner = Literal["below", "above", "everywhere", "nowhere"]


@dataclass(frozen=True)
class Spread:
    """Of ``n`` numbers: the median, the quartiles around it, and the mean."""

    median: float
    lower_quartile: float
    upper_quartile: float
    mean: float
    n: int

    def as_dict(self, unit: str = "") -> dict[str, float]:
        """JSON-ready, with the unit in the names."""
        return {name if name == "n" else name + unit: value for name, value in asdict(self).items()}


def spread(numbers: Sequence[float]) -> Spread:
    """Spread of at least one number."""
    low, _, high = quantiles(numbers, n=4, method="inclusive") if len(numbers) > 1 else (numbers[0],) * 3
    return Spread(median(numbers), low, high, mean(numbers), len(numbers))


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Spread of the ratios of pairs that were measured in the same round."""
    return spread([a / b for a, b in zip(ours, theirs, strict=True)])


@dataclass(frozen=True)
class Line:
    """``intercept + slope * x`` by least squares.

    Attributes:
        slope, intercept: of the line.
        worst_deviation: largest distance of a point from the line, as a fraction of the line there.
    """

    slope: float
    intercept: float
    worst_deviation: float

    def at(self, x: float) -> float:
        """Its height at ``x``."""
        return self.intercept + self.slope * x


def fit_line(x: Sequence[float], y: Sequence[float]) -> Line | None:
    """Line through points; None for fewer than two different ``x``."""
    if len(set(x)) < 2:
        return None
    middle, height = mean(x), mean(y)
    slope = sum((a - middle) * (b - height) for a, b in zip(x, y, strict=True)) / sum((a - middle) ** 2 for a in x)
    line = Line(slope, height - slope * middle, 0.0)
    worst = max(abs(b - line.at(a)) / abs(line.at(a)) for a, b in zip(x, y, strict=True))
    return Line(line.slope, line.intercept, worst)


@dataclass(frozen=True)
class Crossing:
    """Where two lines cross.

    Attributes:
        tokens: the context length, None where they do not cross in the range.
        sooner: where, in the range, the first line is the lower one.
    """

    tokens: float | None
    sooner: Sooner


def break_even(ours: Line, theirs: Line, shortest: float, longest: float) -> Crossing:
    """Where ``ours`` crosses ``theirs`` between two context lengths; lines are not believed beyond what was measured."""
    first, last = (ours.at(x) - theirs.at(x) for x in (shortest, longest))
    if first <= 0 and last <= 0:
        return Crossing(None, "everywhere")
    if first >= 0 and last >= 0:
        return Crossing(None, "nowhere")
    tokens = (ours.intercept - theirs.intercept) / (theirs.slope - ours.slope)
    return Crossing(tokens, "below" if first < 0 else "above")
