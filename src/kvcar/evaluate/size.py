"""How much fits: bytes of a cache, and the longest sequence or largest batch under a memory budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..errors import InputError
from ..sizes import stored_bytes
from ..plan import Plan
from ..geometry import KVGeometry

SizeOf = Callable[[int, int], int]
"""(tokens, batch) -> bytes of a cache."""

_UNITS = {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def full_size(geometry: KVGeometry) -> SizeOf:
    """Bytes of the model's own cache in bfloat16."""
    return lambda tokens, batch: geometry.full_bytes(tokens) * batch


def compressed_size(plan: Plan, model_bytes: int) -> SizeOf:
    """Bytes of a compressed cache, everything counted, for a model that computes in ``model_bytes`` per element.
    """
    return lambda tokens, batch: stored_bytes(plan, tokens, model_bytes, batch)


@dataclass(frozen=True)
class Fits:
    """What fits into a budget.

    Attributes:
        longest_tokens: longest sequence at the given batch, at most the model's positions.
        largest_batch: largest batch at the given length.
        cut_by_positions: whether the model's positions, not memory, limit the length.
    """

    longest_tokens: int
    largest_batch: int
    cut_by_positions: bool


def what_fits(size_of: SizeOf, memory_bytes: int, batch: int, tokens: int, max_positions: int) -> Fits:
    """Longest sequence for ``batch`` and largest batch for ``tokens`` in ``memory_bytes``, weights left out."""
    longest = _largest(lambda n: size_of(n, batch), memory_bytes, max_positions)
    room = memory_bytes // max(1, size_of(tokens, 1))
    batches = _largest(lambda n: size_of(tokens, n), memory_bytes, 2 * room + 1)
    return Fits(longest, batches, cut_by_positions=longest == max_positions)


def parse_bytes(text: str) -> int:
    """Bytes of ``24GiB``, ``512 MiB``, ``80GB`` or a plain number; raises InputError."""
    stripped = text.strip()
    digits = stripped.rstrip("KMGTiB ")
    unit = stripped[len(digits) :].strip()
    try:
        value = float(digits)
    except ValueError:
        value = -1.0
    if unit not in _UNITS or not 0 < value < float("inf"):
        raise InputError(f"{text!r} is no amount of memory; write for example 24GiB, 512MiB or 80GB")
    return int(value * _UNITS[unit])


def _largest(size: Callable[[int], int], budget: int, limit: int) -> int:
    """Largest ``n`` of 0 to ``limit`` whose size is within the budget; sizes never fall as ``n`` grows by much.

    Allocation in steps makes sizes wobble a little, so the result of bisection is checked downwards.
    """
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        if size(middle) <= budget:
            low = middle
        else:
            high = middle - 1
    while low and size(low) > budget:
        low -= 1
    return low
