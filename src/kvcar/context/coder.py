"""Codes to bytes and back, with the range coder of the library ``constriction`` (the extra ``store``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..errors import ContextError, InputError
from .library import store_library
from .model import CONTEXTS, LATENTS_PER_GROUP, CodeModel, context_of, loudness, runs
from .shape import Floats, Integers

Codes = np.ndarray[Any, np.dtype[np.uint8]]
TakeGroup = Callable[[slice, slice, list[Integers], list[Floats]], Integers]
"""(tokens, latents, the run's tokens in each context, weights of each latent) -> codes int64 ``[T, n]``."""


def encode_codes(codes: Codes, bits: Sequence[int]) -> bytes:
    """Bytes of codes uint8 ``[N, R]``, latent ``r`` from 0 to ``2**bits[r] - 1``; see ``docs/format.md``.

    Raises:
        InputError: a code that its bits do not hold, or the extra ``store`` is not installed.
    """
    if codes.shape[1] != len(bits) or (codes >= 2 ** np.array(bits, dtype=np.int64)).any():
        raise InputError(f"codes of shape {codes.shape} do not fit in the bits of {len(bits)} latents")
    queue, categorical = _library()
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
    """Codes uint8 ``[tokens, R]`` that ``encode_codes`` was given.

    Raises:
        ContextError: bytes that no codes give.
        InputError: the extra ``store`` is not installed.
    """
    queue, categorical = _library()
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


def _walk(tokens: int, bits: Sequence[int], take: TakeGroup) -> None:
    """Go over runs of tokens and groups of latents in the format's order; ``take`` codes a group and tells its codes."""
    model = CodeModel(bits)
    starts = range(0, len(bits), LATENTS_PER_GROUP)
    for start, stop in runs(tokens):
        weights, centres = model.weights(), model.centres()
        loud = np.zeros(stop - start, dtype=np.int64)
        run = np.empty((stop - start, len(bits)), dtype=np.int64)
        contexts = np.empty((stop - start, len(starts)), dtype=np.int64)
        for index, first in enumerate(starts):
            group = slice(first, min(first + LATENTS_PER_GROUP, len(bits)))
            contexts[:, index] = context_of(loud)
            places = [np.flatnonzero(contexts[:, index] == context) for context in range(CONTEXTS)]
            run[:, group] = take(slice(start, stop), group, places, weights[group])
            loud += loudness(run[:, group], centres[group])
        model.add(run, contexts)


def _library() -> tuple[Any, Any]:
    """The queue (range coder) and the categorical model of constriction."""
    stream = store_library("constriction").stream
    return stream.queue, stream.model.Categorical
