"""Entropy coding of the codes of one page that stands alone: a width for every latent, and how loud each token is.

``docs/format.md`` has the rules. A context's coder learns what codes to expect as it goes, over thousands of tokens, and
builds its tables anew with every run. A page of 256 tokens instead says beforehand where each latent is centred and how
wide it is (1 % of its bytes), so that tables are few, come from a fixed stock, and are looked up: a page is decoded some
eight times faster, for half a percent more bytes (``docs/log.md``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from decimal import Decimal, localcontext
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from ..context.entropy import Codes, Floats, Integers, store_library, symmetric_distribution
from ..errors import ContextError, InputError

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

# Deviations come in 192 widths, 16 to a doubling; a latent has one of every fourth, a token's loudness moves it.
_WIDTHS, _WIDTHS_PER_DOUBLING, _SMALLEST_WIDTH = 192, 16, Decimal(1) / 16
_WIDTH_STEP = 4
_QUARTERS = 4
_LATENTS_PER_GROUP = 64  # that share one look at how loud a token is
_LOUDNESS_PERCENT = (50, 65, 80, 92, 108, 125, 150)
_CONTEXTS = len(_LOUDNESS_PERCENT) + 1
_LOUDEST, _LOUDNESS_UNIT = 64, 20
_LARGEST_SHIFT = 64
_REACH = 512  # beyond every deviation
_LEAST_WEIGHT = 1e-9  # of a code that the distribution has no room for

# The normal distribution function: a table, straight between its places.
_STEPS_PER_UNIT, _UNITS = 32, 8


class PageParameters(NamedTuple):
    """What a page says of its latents beforehand.

    Attributes:
        shifts: int64 ``[contexts]``: so many widths wider than usual are tokens of each loudness.
        centres: int64 ``[R]``, the code that a latent is centred on.
        quarters: int64 ``[R]``, -2 to 1: how many quarters of a code beyond it the centre lies.
        widths: int64 ``[R]``, 0 to 47.
    """

    shifts: Integers
    centres: Integers
    quarters: Integers
    widths: Integers

    def to_bytes(self, bits: Integers) -> Bytes:
        """Uint8 ``[8 + 3 R]``; centres relative to the middle of their levels."""
        centres = self.centres - 2 ** (bits - 1)
        parts = (self.shifts, centres, self.quarters, self.widths)
        return (np.concatenate(parts) % 256).astype(np.uint8)

    @classmethod
    def from_bytes(cls, data: Bytes, bits: Integers) -> PageParameters:
        """Undo ``to_bytes``; raises ContextError for what no page says."""
        signed, count = data.view(np.int8).astype(np.int64), len(bits)
        if len(signed) != _CONTEXTS + 3 * count:
            raise ContextError(f"{len(signed)} parameters of {count} latents; write the record again")
        shifts, centres, quarters, widths = np.split(signed, _CONTEXTS + count * np.arange(3))
        centres = (centres + 2 ** (bits - 1)) % 256
        sound = (
            np.abs(shifts).max() <= _LARGEST_SHIFT
            and (centres < 2**bits).all()
            and (np.abs(2 * quarters + 1) <= _QUARTERS).all()
            and ((widths >= 0) & (widths < _WIDTHS // _WIDTH_STEP)).all()
        )
        if not sound:
            raise ContextError("parameters of latents that no page has; write the record again")
        return cls(shifts, centres, quarters, widths)


def parameter_bytes(latents: int) -> int:
    """Bytes of the parameters of so many latents."""
    return _CONTEXTS + 3 * latents


def encode_page(codes: Codes, bits: Sequence[int]) -> tuple[Bytes, bytes]:
    """Code ``codes`` uint8 ``[T, R]``, latent ``r`` from 0 to ``2**bits[r] - 1``: parameters uint8 ``[8 + 3 R]``, and bytes.

    Raises:
        InputError: a code that its bits do not hold, no codes, or the extra ``store`` is not installed.
    """
    widths = np.array(bits, dtype=np.int64)
    if codes.shape[1] != len(widths) or not codes.size or (codes >= 2**widths).any():
        raise InputError(f"codes of shape {codes.shape} do not fit in the bits of {len(widths)} latents")
    encoder = store_library("constriction").stream.queue.RangeEncoder()
    parameters = _parameters_of(codes, widths)
    distances = codes.astype(np.int64) - parameters.centres
    walk = _Walk(parameters, widths, len(codes))
    for group in walk.groups():
        own = distances[:, group]
        symbols = (own.T + 2 ** widths[group][:, None]).ravel().astype(np.int32)
        order, runs = walk.models(group)
        for places, model in runs:
            encoder.encode(symbols[order[places]], model)
        walk.add(group, own)
    return parameters.to_bytes(widths), np.asarray(encoder.get_compressed()).astype("<u4").tobytes()


def decode_page(parameters: Bytes, data: bytes | memoryview, tokens: int, bits: Sequence[int]) -> Codes:
    """Decode the uint8 ``[tokens, R]`` that ``encode_page`` was given.

    Raises:
        ContextError: parameters or bytes that no codes give.
        InputError: the extra ``store`` is not installed.
    """
    widths = np.array(bits, dtype=np.int64)
    if len(data) % 4:
        raise ContextError(f"codes come in words of 4 bytes, got {len(data)} bytes; write the record again")
    words = np.frombuffer(data, dtype="<u4").astype(np.uint32)
    decoder = store_library("constriction").stream.queue.RangeDecoder(words)
    found = PageParameters.from_bytes(parameters, widths)
    walk = _Walk(found, widths, tokens)
    codes = np.empty((tokens, len(widths)), dtype=np.int64)
    for group in walk.groups():
        order, runs = walk.models(group)
        symbols = np.empty(len(order), dtype=np.int64)
        try:
            for places, model in runs:
                symbols[order[places]] = decoder.decode(model, places.stop - places.start)
        except AssertionError as error:
            raise ContextError(f"codes cannot be decoded: {error}; write the record again") from None
        own = symbols.reshape(-1, tokens).T - 2 ** widths[group]
        codes[:, group] = own + found.centres[group]
        walk.add(group, own)
    if ((codes < 0) | (codes >= 2**widths)).any():
        raise ContextError("codes that their bits do not hold; write the record again")
    return codes.astype(np.uint8)


class _Walk:
    """The format's order: groups of latents, and in a group codes of the same table together.

    Args:
        parameters: of the page.
        bits: of each latent.
        tokens: of the page.
    """

    def __init__(self, parameters: PageParameters, bits: Integers, tokens: int) -> None:
        self._parameters, self._bits = parameters, bits
        self._weights = _loudness_weights()[_WIDTH_STEP * parameters.widths]
        self._loud = np.zeros(tokens, dtype=np.int64)

    def groups(self) -> Iterator[slice]:
        """Latents that share one look at the tokens' loudness."""
        for first in range(0, len(self._bits), _LATENTS_PER_GROUP):
            yield slice(first, min(first + _LATENTS_PER_GROUP, len(self._bits)))

    def models(self, group: slice) -> tuple[Integers, list[tuple[slice, Any]]]:
        """The order in which the codes of a group, latent by latent, are taken, and the table of each run of it."""
        own, contexts = self._parameters, self.contexts()
        shifts = own.shifts[contexts] if contexts is not None else np.zeros(len(self._loud), dtype=np.int64)
        wide = np.clip(_WIDTH_STEP * own.widths[group][:, None] + shifts, 0, _WIDTHS - 1)
        shape = self._bits[group] * _QUARTERS + own.quarters[group] + 2
        keys = (shape[:, None] * _WIDTHS + wide).ravel().astype(np.int16)
        order = np.argsort(keys, kind="stable")
        ordered = keys[order]
        cuts = [0, *(np.flatnonzero(np.diff(ordered)) + 1).tolist(), len(ordered)]
        runs = [slice(first, stop) for first, stop in pairwise(cuts)]
        return order, [(run, _table(int(ordered[run.start]))) for run in runs]

    def contexts(self) -> Integers | None:
        """How loud each token was so far, ``[T]`` of 0 to 7, relative to all; None where nothing is known."""
        total = self._loud.sum()
        if total == 0:
            return None
        return (100 * len(self._loud) * self._loud[:, None] > np.array(_LOUDNESS_PERCENT) * total).sum(1)

    def add(self, group: slice, distances: Integers) -> None:
        """Take in the distances ``[T, n]`` of a group's codes from their centres."""
        self._loud += np.minimum(np.abs(distances) * self._weights[group], _LOUDEST).sum(1)


# What a writer chooses; a reader takes whatever it was


def _parameters_of(codes: Codes, bits: Integers) -> PageParameters:
    tokens, sums = len(codes), codes.sum(0, dtype=np.int64)
    quarters = (8 * sums + tokens) // (2 * tokens)
    centres = (quarters + 2) // 4
    distances = np.abs(codes - quarters / 4)
    offsets = quarters - 4 * centres
    usual = _mean_distances()[offsets + 2, ::_WIDTH_STEP]
    widths = np.abs(usual - distances.mean(0)[:, None]).argmin(1)
    silent = PageParameters(np.zeros(_CONTEXTS, dtype=np.int64), centres, offsets, widths)
    return silent._replace(shifts=_shifts_of(distances, codes.astype(np.int64) - centres, silent, bits))


def _shifts_of(distances: Floats, from_centres: Integers, silent: PageParameters, bits: Integers) -> Integers:
    """How much wider tokens of each loudness are than all together, in widths."""
    walk = _Walk(silent, bits, len(distances))
    relative = distances / np.maximum(distances.mean(0), 1 / 16)
    found, expected = np.zeros(_CONTEXTS), np.zeros(_CONTEXTS)
    for group in walk.groups():
        contexts = walk.contexts()
        if contexts is not None:
            found += np.bincount(contexts, relative[:, group].sum(1), minlength=_CONTEXTS)
            expected += np.bincount(contexts, minlength=_CONTEXTS) * relative[:, group].mean(0).sum()
        walk.add(group, from_centres[:, group])
    known = (found > 0) & (expected > 0)
    ratio = np.where(known, found, 1.0) / np.where(known, expected, 1.0)
    shifts = np.round(_WIDTHS_PER_DOUBLING * np.log2(ratio)).astype(np.int64)
    return np.clip(shifts, -_LARGEST_SHIFT, _LARGEST_SHIFT)


# Tables. Every number that a reader needs comes from ``decimal``, which rounds correctly everywhere.


@cache
def _table(key: int) -> Any:
    """The categorical model of distances from the centre, shifted by ``2**bits``; ``key`` as ``_Walk.models`` makes it."""
    shape, width = divmod(key, _WIDTHS)
    bits, quarters = divmod(shape, _QUARTERS)
    weights = _probabilities(2**bits, (quarters - 2) / 4, _deviations()[width]) + _LEAST_WEIGHT
    return store_library("constriction").stream.model.Categorical(weights, perfect=False)


def _probabilities(reach: int, centre: float, deviation: float) -> Floats:
    """Probabilities ``[2 reach]`` of the distances from ``-reach`` to ``reach - 1``, normal about ``centre``, open-ended."""
    edges = (np.arange(1, 2 * reach, dtype=np.float64) - 0.5 - reach - centre) / deviation
    return np.diff(np.concatenate([[0.0], symmetric_distribution(_normal(), _STEPS_PER_UNIT, edges), [1.0]]))


@cache
def _normal() -> Floats:
    """The distribution function at 0, 1/32, 2/32, ... 8 and once more at the end."""
    exact = [_normal_at(Decimal(i) / _STEPS_PER_UNIT) for i in range(_STEPS_PER_UNIT * _UNITS + 1)]
    return np.array([*exact, exact[-1]])


def _normal_at(u: Decimal) -> float:
    """1/2 + the density's integral from 0 to ``u``, by its power series: all terms of one sign, the density outside."""
    with localcontext(prec=50):
        term = total = u
        odd = 1
        while term > total.scaleb(-40):
            odd += 2
            term = term * u * u / odd
            total += term
        two_pi = 2 * Decimal("3.14159265358979323846264338327950288419716939937511")
        return float(Decimal("0.5") + total * (-u * u / 2).exp() / two_pi.sqrt())


@cache
def _deviations() -> Floats:
    """The 192 deviations, in codes."""
    with localcontext(prec=28):
        return np.array([float(_SMALLEST_WIDTH * 2 ** (Decimal(i) / _WIDTHS_PER_DOUBLING)) for i in range(_WIDTHS)])


@cache
def _loudness_weights() -> Integers:
    """What a distance of one code counts in a token's loudness, for every deviation: whole numbers from 1 to 64."""
    return np.clip(np.floor(_LOUDNESS_UNIT / _deviations()), 1, _LOUDEST).astype(np.int64)


@cache
def _mean_distances() -> Floats:
    """Mean distance of rounded values from their centre ``[4, 192]``, for every quarter of a code and deviation."""
    centres = (np.arange(_QUARTERS) - 2) / 4
    places = np.arange(-_REACH, _REACH)
    return np.array([[np.abs(places - c) @ _probabilities(_REACH, c, d) for d in _deviations()] for c in centres])
