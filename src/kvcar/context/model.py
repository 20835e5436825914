"""What the coder expects of codes, learnt from those that both sides know already. ``docs/format.md`` has the rules.

Tokens are coded in runs that grow, latents of a run one after the other. A code's probabilities are the counts of
its latent so far in the same *context*, on top of a logistic prior whose centre and width follow the counts too. The
context is how far this token's codes, those that came before in the run, lie from their centres: some tokens are
loud throughout. All that decides is integer arithmetic, so that reader and writer agree to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from .shape import FIXED, Floats, Integers, code_probabilities

LATENTS_PER_GROUP = 64
"""Latents that share one look at the context."""

_FIRST_RUN_TOKENS = 16
_LOUDNESS_PERCENT = (75, 90, 105, 125)
CONTEXTS = len(_LOUDNESS_PERCENT) + 1
_LOUDEST_CODE = 2
_PRIOR_TOKENS, _CONTEXT_TOKENS, _WIDTH_TOKENS = 128, 64, 2


def runs(tokens: int) -> Iterator[tuple[int, int]]:
    """First token of each run and of the next: 16 tokens at least, or half as many as came before."""
    start = 0
    while start < tokens:
        stop = min(tokens, start + max(_FIRST_RUN_TOKENS, start // 2))
        yield start, stop
        start = stop


class WidthModel:
    """Counts of the latents that have the same bits.

    Args:
        latents: how many.
        bits: of each.
    """

    def __init__(self, latents: int, bits: int) -> None:
        self._levels = 2**bits
        self._counts = np.zeros((latents, CONTEXTS, self._levels), dtype=np.int64)
        self._totals = np.zeros((latents, CONTEXTS), dtype=np.int64)

    def centres(self) -> Integers:
        """Mean code of each latent, ``[n]`` in quarters of a code; half the levels as long as nothing is known."""
        known = self._totals.sum(1)
        sums = (self._counts.sum(1) * np.arange(self._levels)).sum(1)
        quarters, tokens = 4 * (sums + _WIDTH_TOKENS * (self._levels // 2)), known + _WIDTH_TOKENS
        return (2 * quarters + tokens) // (2 * tokens)  # to the nearest

    def weights(self) -> Floats:
        """What probabilities are proportional to, ``[n, contexts, levels]``."""
        centres = self.centres()
        prior = code_probabilities(self._levels, centres, self._deviations(centres))
        return self._counts + _PRIOR_TOKENS * prior

    def add(self, codes: Integers, contexts: Integers) -> None:
        """Count codes ``[T, n]`` that came in ``contexts`` ``[T, n]``."""
        latents, levels = self._counts.shape[0], self._levels
        cell = (np.arange(latents) * CONTEXTS + contexts) * levels + codes
        self._counts += np.bincount(cell.ravel(), minlength=self._counts.size).reshape(self._counts.shape)
        self._totals = self._counts.sum(2)

    def _deviations(self, centres: Integers) -> Integers:
        """Expected distance from the centre, ``[n, contexts]`` in ``FIXED``.

        A context's own distances, on top of those of all contexts times what the context does to all latents.
        """
        distance = np.abs(4 * np.arange(self._levels) - centres[:, None])
        own = (self._counts * distance[:, None]).sum(2) * (FIXED // 4)
        first = max(FIXED * self._levels // 10, FIXED * 2 // 5)
        overall = (own.sum(1) + _WIDTH_TOKENS * first) // (self._totals.sum(1) + _WIDTH_TOKENS)
        expected = (self._totals * overall[:, None]).sum(0)
        factor = (own.sum(0) + FIXED) * FIXED // (expected + FIXED)
        shared = overall[:, None] * factor // FIXED
        return (own + _CONTEXT_TOKENS * shared) // (self._totals + _CONTEXT_TOKENS)


class CodeModel:
    """Models of all latents, in the order in which they are coded.

    Args:
        bits: of each latent, 1 to 8.
    """

    def __init__(self, bits: Sequence[int]) -> None:
        widths = np.array(bits, dtype=np.int64)
        self.latents = len(widths)
        self._columns = [np.flatnonzero(widths == width) for width in np.unique(widths)]
        self._models = [WidthModel(len(own), int(widths[own[0]])) for own in self._columns]

    def weights(self) -> list[Floats]:
        """For every latent what probabilities are proportional to, ``[contexts, levels]``."""
        found: list[Floats] = [np.empty(0)] * self.latents
        for own, model in zip(self._columns, self._models, strict=True):
            for column, table in zip(own.tolist(), model.weights(), strict=True):
                found[column] = table
        return found

    def centres(self) -> Integers:
        """The code nearest to the middle of each latent, ``[R]``."""
        found = np.zeros(self.latents, dtype=np.int64)
        for own, model in zip(self._columns, self._models, strict=True):
            found[own] = (model.centres() + 2) // 4
        return found

    def add(self, codes: Integers, contexts: Integers) -> None:
        """Take in a run that is coded: codes ``[T, R]``, contexts ``[T, groups]``."""
        for own, model in zip(self._columns, self._models, strict=True):
            model.add(codes[:, own], contexts[:, own // LATENTS_PER_GROUP])


def loudness(codes: Integers, centres: Integers) -> Integers:
    """How far each token's codes ``[T, n]`` lie from their centres ``[n]``, ``[T]``; beyond 2 counts as 2."""
    return np.minimum(np.abs(codes - centres), _LOUDEST_CODE).sum(1)


def context_of(loud: Integers) -> Integers:
    """Context of each token of a run, ``[T]``, from its loudness so far, relative to the run's mean."""
    steps = np.array(_LOUDNESS_PERCENT) * loud.sum()
    return (100 * len(loud) * loud[:, None] > steps).sum(1)
