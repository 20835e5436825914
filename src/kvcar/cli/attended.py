"""What ``--attend-pages`` says, and what ``kvcar eval`` prints of it."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

from ..errors import InputError
from ..evaluate.attended import Attended
from ..runtime.summaries import PageCounts


def page_counts(given: str | None) -> int | tuple[int, ...] | None:
    """Pages of ``--attend-pages``: one number for all layers, or one for each.

    Raises:
        InputError: these are no numbers, or fewer pages than 1.
    """
    if given is None:
        return None
    try:
        counts = tuple(int(part) for part in given.split(","))
    except ValueError:
        counts = (0,)
    if min(counts) < 1:
        raise InputError(
            f"--attend-pages takes a number of pages, or one for each layer with commas between, each 1 or more; got {given!r}"
        )
    return counts[0] if len(counts) == 1 else counts


def attended_table(results: Mapping[PageCounts | None, Attended]) -> Table:
    """A row for each number of pages."""
    first = next(iter(results.values()))
    table = Table(
        title=f"{first.windows} windows of {first.context:,} tokens, the last {first.following:,} stepped "
        f"{first.step_tokens} at a time; perplexity of the full cache {first.perplexity_full.value:.3f}",
        title_justify="left",
    )
    table.add_column("pages attended")
    for heading in (
        "times smaller",
        "ratio to full",
        "KL divergence",
        "from all pages",
        "same top-1",
        "time/step (full)",
    ):
        table.add_column(heading, justify="right")
    for pages, a in results.items():
        table.add_row(
            _attended(pages, a.pages),
            f"{a.times_smaller:.2f}",
            f"{a.perplexity_ratio.value:.4f} ± {a.perplexity_ratio.stderr:.4f}",
            f"{a.kl_divergence.value:.5f} ± {a.kl_divergence.stderr:.5f}",
            f"{a.kl_divergence_from_all.value:.5f}",
            f"{100 * a.same_top.value:.2f} %",
            f"{a.seconds_per_step:.3f} s ({a.seconds_per_step_full:.3f} s)",
        )
    return table


def _attended(counts: PageCounts | None, pages: int) -> str:
    if counts is None:
        return f"all {pages}"
    if isinstance(counts, int):
        return f"{min(counts, pages)} of {pages}"
    return f"{sum(min(count, pages) for count in counts) / len(counts):.1f} of {pages}, by layer"
