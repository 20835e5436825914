"""How much memory pages and windows take: the same arithmetic for the runtime, for budgets and for ``kvcar size``."""

from __future__ import annotations

from .plan import Plan
from .geometry import BFLOAT16_BYTES
from .layout import page_layout

WINDOW_STEP_TOKENS = 16
FINE_POSITIONS = 64
_FEWEST_PAGES = 8
_GROWTH_DIVISOR = 8


def next_arena_pages(pages: int) -> int:
    """Pages to allocate at once when ``pages`` are full: an eighth more, so that waste stays below an eighth."""
    return max(_FEWEST_PAGES, -(-pages // _GROWTH_DIVISOR))


def allocated_pages(pages: int) -> int:
    """Pages that exist in memory when ``pages`` hold tokens."""
    total = 0
    while total < pages:
        total += next_arena_pages(total)
    return total


def coded_tokens(tokens: int, window: int, page_tokens: int) -> int:
    """Tokens, of ``tokens`` seen, that lie in pages; full pages leave the window, or every token without one."""
    if window == 0:
        return tokens
    return max(0, tokens - window) // page_tokens * page_tokens


def window_capacity(held: int) -> int:
    """Tokens that a window's buffer has room for when it holds ``held``."""
    return -(-held // WINDOW_STEP_TOKENS) * WINDOW_STEP_TOKENS


def exact_element_bytes(plan: Plan, model_bytes: int) -> int:
    """Bytes of an element kept exactly, for a model that computes in ``model_bytes`` bytes per element."""
    return model_bytes if plan.exact_dtype == "model" else BFLOAT16_BYTES


def rotary_table_entries(positions: int) -> int:
    """Entries of the coarse table of angles for ``positions`` positions: a power of two of ``FINE_POSITIONS``."""
    return 1 << max(0, -(-positions // FINE_POSITIONS) - 1).bit_length()


def table_bytes(plan: Plan, tokens: int, batch: int) -> int:
    """Bytes of position tables: padding and offset of each sequence, and angles where the model rotates keys.

    Angles are counted for one kind of rotation of the whole head; rotating less of it takes less.
    """
    state, coded = 2 * 8 * batch, coded_tokens(tokens, plan.window, plan.page_tokens)
    if not plan.geometry.rotary or coded == 0:
        return state
    return state + (FINE_POSITIONS + rotary_table_entries(coded)) * plan.geometry.head_dim * 4


def stored_bytes(plan: Plan, tokens: int, model_bytes: int, batch: int = 1) -> int:
    """Bytes of the compressed cache's tensors for ``batch`` sequences of ``tokens`` tokens.

    Counts pages (as allocated), sinks, window (as allocated), position tables, and the ordinary cache of layers that
    are not coded.
    """
    geometry, exact_bytes = plan.geometry, exact_element_bytes(plan, model_bytes)
    coded = coded_tokens(tokens, plan.window, plan.page_tokens)
    pages = allocated_pages(-(-coded // plan.page_tokens)) * page_layout(plan, exact_bytes).page_bytes
    exact = (plan.sinks + window_capacity(tokens - coded)) * geometry.layer_elements_per_token * exact_bytes
    kept = 0
    for layer in range(geometry.layers):
        if layer not in plan.coded_layers:
            seen = min(tokens, geometry.sliding_window - 1) if layer in geometry.sliding_layers else tokens
            kept += seen * geometry.layer_elements_per_token * model_bytes
    tables = table_bytes(plan, tokens, batch) if plan.coded_layers else 2 * 8 * batch
    return batch * (pages + exact * len(plan.coded_layers) + kept) + tables
