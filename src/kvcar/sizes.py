"""Bytes of everything: pages, windows and tables of a cache, codecs beside them, and what fits into memory.

The runtime, budgets of a fit, ``kvcar size`` and every figure that a user is shown share this arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from .errors import InputError
from .geometry import BFLOAT16_BYTES, KVGeometry
from .layout import page_layouts
from .plan import Plan

WINDOW_STEP_TOKENS = 16
FINE_POSITIONS = 64
_FEWEST_PAGES = 8
_GROWTH_DIVISOR = 8
_UNITS = {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "KB": 10**3, "MB": 10**6, "GB": 10**9}

REFERENCE_TOKENS = 4096
"""Context length at which ``times_smaller`` is promised."""

SizeOf = Callable[[int, int], int]
"""(tokens, batch) -> bytes of a cache."""


def next_arena_pages(pages: int) -> int:
    """Count pages to allocate at once when ``pages`` are full: an eighth more, so that waste stays below an eighth."""
    return max(_FEWEST_PAGES, -(-pages // _GROWTH_DIVISOR))


def allocated_pages(pages: int) -> int:
    """Count pages that exist in memory when ``pages`` hold tokens."""
    total = 0
    while total < pages:
        total += next_arena_pages(total)
    return total


def coded_tokens(tokens: int, window: int, page_tokens: int) -> int:
    """Count the tokens, of ``tokens`` seen, that lie in pages; full pages leave the window, or every token without one."""
    if window == 0:
        return tokens
    return max(0, tokens - window) // page_tokens * page_tokens


def slid_out_pages(tokens: int, coded: int, window: int, page_tokens: int) -> int:
    """Count the pages that no later token of a layer with a sliding window attends to, when ``tokens`` have been seen.

    Args:
        tokens: seen.
        coded: those of them that lie in pages.
        window: tokens that a token attends to, itself among them.
        page_tokens: tokens of a page.
    """
    return min(max(0, tokens - window + 1), coded) // page_tokens


def page_bytes(plan: Plan, tokens: int, exact_bytes: int) -> int:
    """Count the bytes of pages, as allocated, of one sequence of ``tokens`` tokens; chunks count as windows that slide."""
    coded, total = coded_tokens(tokens, plan.window, plan.page_tokens), 0
    for layout in page_layouts(plan, exact_bytes):
        pages = -(-coded // plan.page_tokens)
        if layout.windowed:
            pages -= slid_out_pages(tokens, coded, plan.geometry.sliding_window, plan.page_tokens)
        total += (pages if layout.windowed else allocated_pages(pages)) * layout.page_bytes
    return total


def window_capacity(tokens: int) -> int:
    """Count the tokens that a window's buffer has room for when ``tokens`` are in it."""
    return -(-tokens // WINDOW_STEP_TOKENS) * WINDOW_STEP_TOKENS


def exact_element_bytes(plan: Plan, model_bytes: int) -> int:
    """Count the bytes of an element kept exactly, for a model that computes in ``model_bytes`` bytes per element."""
    return model_bytes if plan.exact_dtype == "model" else BFLOAT16_BYTES


def rotary_table_entries(positions: int) -> int:
    """Count entries of the coarse table of angles for ``positions`` positions: a power of two of ``FINE_POSITIONS``."""
    return 1 << max(0, -(-positions // FINE_POSITIONS) - 1).bit_length()


def table_bytes(plan: Plan, tokens: int, batch: int) -> int:
    """Count the bytes of position tables: padding and offset of each sequence, and angles where the model rotates keys.

    Angles are counted for one kind of rotation of the whole head; rotating less of it takes less.
    """
    state, coded = 2 * 8 * batch, coded_tokens(tokens, plan.window, plan.page_tokens)
    if not plan.geometry.rotary or coded == 0:
        return state
    return state + (FINE_POSITIONS + rotary_table_entries(coded)) * plan.geometry.head_dim * 4


def stored_bytes(plan: Plan, tokens: int, model_bytes: int, batch: int = 1) -> int:
    """Count the bytes of the compressed cache's tensors for ``batch`` sequences of ``tokens`` tokens.

    Counts pages (as allocated), sinks, window (as allocated), position tables, and the ordinary cache of layers that
    are not coded.
    """
    geometry, exact_bytes = plan.geometry, exact_element_bytes(plan, model_bytes)
    coded = coded_tokens(tokens, plan.window, plan.page_tokens)
    pages = page_bytes(plan, tokens, exact_bytes)
    exact = (plan.sinks + window_capacity(tokens - coded)) * geometry.layer_elements_per_token * exact_bytes
    others = set(range(geometry.layers)) - set(plan.coded_layers)
    kept = sum(geometry.kept_elements(layer, tokens) for layer in others) * model_bytes
    tables = table_bytes(plan, tokens, batch) if plan.coded_layers else 2 * 8 * batch
    return batch * (pages + exact * len(plan.coded_layers) + kept) + tables


def times_smaller(plan: Plan, model_bytes: int, tokens: int = REFERENCE_TOKENS) -> float:
    """Divide the bytes of the model's own cache in bfloat16 by those of the compressed one; codecs are beside both."""
    return plan.geometry.full_bytes(tokens) / stored_bytes(plan, tokens, model_bytes)


def times_smaller_in_use(plan: Plan, codec_bytes: int, model_bytes: int, tokens: int = REFERENCE_TOKENS) -> float:
    """Divide the bytes of one sequence's own cache in bfloat16 by those of the compressed one and its codecs together."""
    return plan.geometry.full_bytes(tokens) / (stored_bytes(plan, tokens, model_bytes) + codec_bytes)


def codec_figures(plan: Plan, codec_bytes: int, model_bytes: int = BFLOAT16_BYTES) -> dict[str, float | int | None]:
    """Collect what codecs take and when they pay, for records: at ``REFERENCE_TOKENS`` tokens, or the model's positions."""
    tokens = min(REFERENCE_TOKENS, plan.geometry.max_positions)
    return {
        "codec_bytes": codec_bytes,
        "pays_from_tokens": pays_from_tokens(plan, codec_bytes, model_bytes),
        "times_smaller_in_use": times_smaller_in_use(plan, codec_bytes, model_bytes, tokens),
        "tokens_in_use": tokens,
    }


def pays_from_tokens(plan: Plan, codec_bytes: int, model_bytes: int = BFLOAT16_BYTES) -> int | None:
    """Count the tokens from which compressed cache and codecs together are smaller than the model's own cache.

    Codecs are like weights: they exist once, for all sequences. The tokens are those of all sequences together, each of
    them of ``REFERENCE_TOKENS`` tokens, or of as many as the model has positions.

    Returns:
        The tokens; None where the cache alone saves nothing.
    """
    length = min(REFERENCE_TOKENS, plan.geometry.max_positions)
    return break_even_tokens(
        plan.geometry.full_bytes(length), stored_bytes(plan, length, model_bytes), length, codec_bytes
    )


def break_even_tokens(full_bytes: float, cache_bytes: float, tokens: int, codec_bytes: int) -> int | None:
    """Count the tokens at which codecs are paid for, by caches of ``tokens`` tokens; None where nothing is saved."""
    saved = full_bytes - cache_bytes
    return math.floor(codec_bytes / saved * tokens) + 1 if saved > 0 else None


def smaller_from_tokens(plan: Plan, model_bytes: int = BFLOAT16_BYTES) -> int | None:
    """Count the tokens, to the next 64, from which one sequence's compressed cache is smaller than the model's own.

    Sinks and window, which stay exact, and the first pages' unfilled room are most of a short cache. None where the
    cache is never smaller.
    """
    full, step = plan.geometry.full_bytes, FINE_POSITIONS
    length = step
    while stored_bytes(plan, length, model_bytes) >= full(length):
        if length >= plan.geometry.max_positions:
            return None
        length *= 2
    while length > step and stored_bytes(plan, length - step, model_bytes) < full(length - step):
        length -= step
    return length


def size_in_words(plan: Plan, tokens: int, stored: float, model_bytes: int = BFLOAT16_BYTES) -> str:
    """Say how ``stored`` bytes of a cache of ``tokens`` tokens compare with the model's own cache in bfloat16."""
    times = plan.geometry.full_bytes(tokens) / stored
    if times >= 1:
        return f"{times:.2f} times smaller than the full cache (bfloat16)"
    since = smaller_from_tokens(plan, model_bytes)
    until = f", smaller from about {since:,} tokens on" if since else ""
    return f"larger than the full cache (bfloat16), {1 / times:.2f} times{until}"


def codecs_in_words(plan: Plan, codec_bytes: int) -> str:
    """Say what codecs take beside the cache, and from how many tokens the two are smaller than the full cache."""
    pays = pays_from_tokens(plan, codec_bytes)
    since = "never pay" if pays is None else f"pay from {pays:,} tokens, all sequences together"
    tokens = min(REFERENCE_TOKENS, plan.geometry.max_positions)
    used = times_smaller_in_use(plan, codec_bytes, BFLOAT16_BYTES, tokens)
    together = f"{used:.2f} times smaller" if used >= 1 else f"{1 / used:.2f} times larger"
    return f"codecs take {codec_bytes:,} bytes once, and {since}; with them one sequence of {tokens:,} tokens is {together}"


def kept_exactly_in_words(plan: Plan, share: float) -> str:
    """Say that a share, 0 to 1, of a text's coded tokens is kept exactly, and why; empty where none is."""
    limit = plan.cache.page_cost_limit
    if not share or limit is None:
        return ""
    return (
        f"{100 * share:.1f} % of the coded tokens of this text are kept exactly, as their pages would have cost more than {limit:.4f} nats "
        "a token; their bytes are counted"
    )


def full_size(geometry: KVGeometry) -> SizeOf:
    """Make a function that counts the bytes of the model's own cache in bfloat16."""
    return lambda tokens, batch: geometry.full_bytes(tokens) * batch


def compressed_size(plan: Plan, model_bytes: int) -> SizeOf:
    """Make a function that counts the bytes of a compressed cache, everything in it, for a model that computes in ``model_bytes`` per element."""
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
    """Find the longest sequence for ``batch`` and largest batch for ``tokens`` in ``memory_bytes``, weights left out."""
    longest = _largest(lambda n: size_of(n, batch), memory_bytes, max_positions)
    room = memory_bytes // max(1, size_of(tokens, 1))
    batches = _largest(lambda n: size_of(tokens, n), memory_bytes, 2 * room + 1)
    return Fits(longest, batches, cut_by_positions=longest == max_positions)


def parse_bytes(text: str) -> int:
    """Read the bytes of ``24GiB``, ``512 MiB``, ``80GB`` or a plain number; raises InputError."""
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
    """Find the largest ``n`` of 0 to ``limit`` whose size is within the budget; sizes never fall as ``n`` grows by much.

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
