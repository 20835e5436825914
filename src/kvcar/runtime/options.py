"""What a cache may be asked for, checked."""

from __future__ import annotations

from ..errors import InputError
from ..plan import Plan
from .summaries import PageCounts


def checked_pages(attend_pages: PageCounts | None, layers: int) -> PageCounts | None:
    """``attend_pages`` as it is given, if it is one number or one for each layer, all of at least 1; InputError if not."""
    if attend_pages is None:
        return None
    counts = (attend_pages,) if isinstance(attend_pages, int) else tuple(attend_pages)
    if any(count < 1 for count in counts):
        raise InputError(f"attend_pages must be at least 1 page, got {min(counts)}; leave it out to attend to all")
    if isinstance(attend_pages, int):
        return attend_pages
    if len(counts) != layers:
        raise InputError(f"attend_pages must be one number or {layers}, one for each layer; got {len(counts)}")
    return counts


def with_window(plan: Plan, window: int | None) -> Plan:
    """The plan with another window, None for its own; raises InputError unless that is 0 or whole pages."""
    if window is None or window == plan.window:
        return plan
    if window < 0 or window % plan.page_tokens:
        raise InputError(f"window must be 0 or a multiple of the page size, {plan.page_tokens} tokens; got {window}")
    return plan.model_copy(update={"window": window})
