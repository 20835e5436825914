"""What ``kvcar eval --attend-pages`` measures and prints."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

from ..evaluate.attended import Attended


def attended_table(results: Mapping[int | None, Attended]) -> Table:
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
            f"all {a.pages}" if pages is None else f"{min(pages, a.pages)} of {a.pages}",
            f"{a.times_smaller:.2f}",
            f"{a.perplexity_ratio.value:.4f} ± {a.perplexity_ratio.stderr:.4f}",
            f"{a.kl_divergence.value:.5f} ± {a.kl_divergence.stderr:.5f}",
            f"{a.kl_divergence_from_all.value:.5f}",
            f"{100 * a.same_top.value:.2f} %",
            f"{a.seconds_per_step:.3f} s ({a.seconds_per_step_full:.3f} s)",
        )
    return table
