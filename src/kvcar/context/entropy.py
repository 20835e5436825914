"""Entropy coding of integer codes: the model of what codes to expect, the range coder, and the entropy on its own.

``docs/format.md`` has the rules. Tokens are coded in runs that grow, the latents of a run one after the other. A code's
probabilities are the counts of its latent so far in the same *context*, on top of a logistic prior whose centre and
width follow the counts too. The context is how far this token's earlier codes of the run lie from their centres: some
tokens are loud throughout. Everything that decides is integer arithmetic or a single IEEE operation at a time, so that
writer and reader agree to the bit on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal, localcontext
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
from torch import Tensor

from ..errors import ContextError, InputError

Codes = np.ndarray[Any, np.dtype[np.uint8]]
Floats = np.ndarray[Any, np.dtype[np.float64]]
Integers = np.ndarray[Any, np.dtype[np.int64]]
TakeGroup = Callable[[slice, slice, list[Integers], list[Floats]], Integers]
"""(tokens, latents, the run's tokens in each context, weights of each latent) -> codes int64 ``[T, n]``."""

FIXED = 1024
"""Mean absolute deviations are whole numbers of 1/1024 code."""

# The logistic prior: a table of its distribution function, and the scales that it comes in.
_STEPS_PER_UNIT, _UNITS = 16, 20
_SCALES, _SCALES_PER_DOUBLING, _SMALLEST_SCALE = 192, 16, Decimal(1) / 16
_DISTANCES_SUMMED = 1024

# The model of codes.
_LATENTS_PER_GROUP = 64  # that share one look at the context
_FIRST_RUN_TOKENS = 16
_LOUDNESS_PERCENT = (75, 90, 105, 125)
_CONTEXTS = len(_LOUDNESS_PERCENT) + 1
_LOUDEST_CODE = 2
_PRIOR_TOKENS, _CONTEXT_TOKENS, _WIDTH_TOKENS = 128, 64, 2

_LATENTS_AT_ONCE = 512


def encode_codes(codes: Codes, bits: Sequence[int]) -> bytes:
    """Code ``codes`` uint8 ``[N, R]``, latent ``r`` from 0 to ``2**bits[r] - 1``, into bytes.

    Raises:
        InputError: a code that its bits do not hold, or the extra ``store`` is not installed.
    """
    if codes.shape[1] != len(bits) or (codes >= 2 ** np.array(bits, dtype=np.int64)).any():
        raise InputError(f"codes of shape {codes.shape} do not fit in the bits of {len(bits)} latents")
    queue, categorical = _range_coder()
    encoder = queue.RangeEncoder()

    def take(tokens: slice, latents: slice, places: list[Integers], weights: list[Floats]) -> Integers:
        own = codes[tokens, latents]
        for column, table in zip(np.ascontiguousarray(own.T, dtype=np.int32), weights, strict=True):
            for context, of_context in enumerate(places):
                if len(of_context):
                    encoder.encode(column[of_context], categorical(table[context], perfect=False))
        return own.astype(np.int64)

    _walk(codes.shape[0], bits, take)
    return np.asarray(encoder.get_compressed()).astype("<u4").tobytes()


def decode_codes(data: bytes | memoryview, tokens: int, bits: Sequence[int]) -> Codes:
    """Decode the uint8 ``[tokens, R]`` that ``encode_codes`` was given.

    Raises:
        ContextError: bytes that no codes give.
        InputError: the extra ``store`` is not installed.
    """
    queue, categorical = _range_coder()
    if len(data) % 4:
        raise ContextError(f"coded latents come in words of 4 bytes, got {len(data)} bytes; save the context again")
    decoder = queue.RangeDecoder(np.frombuffer(data, dtype="<u4").astype(np.uint32))
    codes = np.empty((tokens, len(bits)), dtype=np.uint8)

    def take(tokens: slice, latents: slice, places: list[Integers], weights: list[Floats]) -> Integers:
        own = np.empty((len(weights), tokens.stop - tokens.start), dtype=np.int64)
        for column, table in zip(own, weights, strict=True):
            for context, of_context in enumerate(places):
                if len(of_context):
                    column[of_context] = decoder.decode(categorical(table[context], perfect=False), len(of_context))
        codes[tokens, latents] = own.T
        return own.T

    try:
        _walk(tokens, bits, take)
    except AssertionError as error:
        raise ContextError(f"coded latents cannot be decoded: {error}; save the context again") from None
    return codes


def entropy_bits_per_token(codes: Tensor) -> float:
    """Sum the empirical entropy of every latent: what one token's codes take in a stored context, within about 2 %.

    The coder has to learn the distributions, but it also knows more than they do (the context): at 4,096 tokens it took
    1.7 to 1.9 % less than this, at 512 tokens 1.3 % more. A small sample looks too predictable: by half a bit times the
    levels in use, over the tokens.

    Args:
        codes: integers of any dtype ``[N, R]``, at least 0: a sample of ``N`` tokens.

    Raises:
        InputError: no tokens, another number of axes, or negative codes.
    """
    if codes.ndim != 2 or codes.shape[0] == 0 or codes.is_floating_point():
        raise InputError(
            f"codes must be integers [tokens, latents] of at least one token, got {codes.dtype} {tuple(codes.shape)}"
        )
    if codes.numel() and int(codes.min()) < 0:
        raise InputError(f"codes start at 0, got {int(codes.min())}; subtract the lowest code first")
    tokens, total = codes.shape[0], 0.0
    for part in codes.cpu().split(_LATENTS_AT_ONCE, dim=1) if codes.numel() else ():
        own = part.numpy().astype(np.int64)
        levels = int(own.max()) + 1
        counts = np.bincount((own + np.arange(own.shape[1]) * levels).ravel())
        counts = counts[counts > 0]
        total += own.shape[1] * np.log2(tokens) - float((counts * np.log2(counts)).sum()) / tokens
    return float(total)


def store_library(name: str) -> Any:
    """Import a library of the extra ``store``; raises InputError, saying what to install, where it is missing."""
    try:
        return import_module(name)
    except ImportError:
        raise InputError(
            f"stored contexts need the library {name}; install it with: pip install 'kvcar[store]'"
        ) from None


def _range_coder() -> tuple[Any, Any]:
    """The queue (range coder) and the categorical model of constriction."""
    stream = store_library("constriction").stream
    return stream.queue, stream.model.Categorical


# The order in which codes are taken


def runs(tokens: int) -> Iterator[tuple[int, int]]:
    """Yield the first token of each run and of the next: 16 tokens at least, or half as many as came before."""
    start = 0
    while start < tokens:
        stop = min(tokens, start + max(_FIRST_RUN_TOKENS, start // 2))
        yield start, stop
        start = stop


def _walk(tokens: int, bits: Sequence[int], take: TakeGroup) -> None:
    """Go over runs of tokens and groups of latents in the format's order; ``take`` codes a group, returning its codes."""
    model = _CodeModel(bits)
    starts = range(0, len(bits), _LATENTS_PER_GROUP)
    for start, stop in runs(tokens):
        weights, centres = model.weights(), model.centres()
        loud = np.zeros(stop - start, dtype=np.int64)
        run = np.empty((stop - start, len(bits)), dtype=np.int64)
        contexts = np.empty((stop - start, len(starts)), dtype=np.int64)
        for index, first in enumerate(starts):
            group = slice(first, min(first + _LATENTS_PER_GROUP, len(bits)))
            contexts[:, index] = _context_of(loud)
            places = [np.flatnonzero(contexts[:, index] == context) for context in range(_CONTEXTS)]
            run[:, group] = take(slice(start, stop), group, places, weights[group])
            loud += _loudness(run[:, group], centres[group])
        model.add(run, contexts)


def _loudness(codes: Integers, centres: Integers) -> Integers:
    """How far each token's codes ``[T, n]`` lie from their centres ``[n]``, ``[T]``; beyond 2 counts as 2."""
    return np.minimum(np.abs(codes - centres), _LOUDEST_CODE).sum(1)


def _context_of(loud: Integers) -> Integers:
    """Context of each token of a run, ``[T]``, from its loudness so far, relative to the run's mean."""
    steps = np.array(_LOUDNESS_PERCENT) * loud.sum()
    return (100 * len(loud) * loud[:, None] > steps).sum(1)


# What codes to expect


class _WidthModel:
    """Counts of the latents that have the same bits.

    Args:
        latents: how many.
        bits: of each.
    """

    def __init__(self, latents: int, bits: int) -> None:
        self._levels = 2**bits
        self._counts = np.zeros((latents, _CONTEXTS, self._levels), dtype=np.int64)
        self._totals = np.zeros((latents, _CONTEXTS), dtype=np.int64)

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
        cell = (np.arange(latents) * _CONTEXTS + contexts) * levels + codes
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


class _CodeModel:
    """Models of all latents, in the order in which they are coded.

    Args:
        bits: of each latent, 1 to 8.
    """

    def __init__(self, bits: Sequence[int]) -> None:
        widths = np.array(bits, dtype=np.int64)
        self.latents = len(widths)
        self._columns = [np.flatnonzero(widths == width) for width in np.unique(widths)]
        self._models = [_WidthModel(len(own), int(widths[own[0]])) for own in self._columns]

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
            model.add(codes[:, own], contexts[:, own // _LATENTS_PER_GROUP])


# The prior: a discretised logistic distribution. Exponentials come from ``decimal``, which rounds correctly everywhere.


def code_probabilities(levels: int, centre_quarters: Integers, deviation: Integers) -> Floats:
    """Compute the probabilities ``[n, C, levels]`` of codes.

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


def _distribution(u: Floats) -> Floats:
    """The logistic distribution function."""
    return symmetric_distribution(_logistic(), _STEPS_PER_UNIT, u)


def symmetric_distribution(table: Floats, steps_per_unit: int, u: Floats) -> Floats:
    """A distribution function that is symmetric about 0, straight between the places of a table.

    Args:
        table: its values at 0, 1, 2, ... over ``steps_per_unit``, the last one twice.
        steps_per_unit: places to a unit.
        u: where, of any shape.
    """
    place = np.minimum(np.abs(u) * steps_per_unit, float(len(table) - 2))
    index = place.astype(np.int64)
    low = table[index]
    upper = low + (place - index) * (table[index + 1] - low)
    return np.where(u < 0, 1.0 - upper, upper)


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
    halves = np.arange(_DISTANCES_SUMMED) + 0.5
    means = []
    for scale in scales:
        tails = 1.0 - _distribution(halves / scale)
        # Rounded once: a plain sum differs between versions of Python.
        means.append(int(2 * FIXED * math.fsum(tails.tolist())))
    return scales, np.array(means, dtype=np.int64)
