"""Fidelity as a table."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

from ..evaluate.fidelity import Fidelity

_HEADINGS = (
    "times smaller",
    "bytes/token",
    "codecs (bytes)",
    "perplexity",
    "ratio to full",
    "KL divergence",
    "same top-1",
)


def fidelity_table(results: Mapping[str, Fidelity]) -> Table:
    """Make a table with a row for each cache."""
    first = next(iter(results.values()))
    table = Table(
        title=f"stepped through the cache, {first.windows} windows of {first.context:,} tokens", title_justify="left"
    )
    table.add_column("cache", overflow="fold")
    for heading in _HEADINGS:
        table.add_column(heading, justify="right")
    full = first.perplexity_full
    table.add_row(
        "full (bfloat16 bytes)",
        "1.00",
        f"{first.full_bytes_per_token:,.0f}",
        "",
        f"{full.value:.3f} ± {full.stderr:.3f}",
        "1",
        "0",
        "100 %",
    )
    for name, f in results.items():
        table.add_row(
            name,
            f"{f.times_smaller:.2f}" if f.times_smaller >= 1 else f"{1 / f.times_smaller:.2f} larger",
            f"{f.stored_bytes_per_token:,.0f}",
            f"{f.codec_bytes:,}" if f.codec_bytes else "",
            f"{f.perplexity.value:.3f}",
            f"{f.perplexity_ratio.value:.4f} ± {f.perplexity_ratio.stderr:.4f}",
            f"{f.kl_divergence.value:.5f} ± {f.kl_divergence.stderr:.5f}",
            f"{100 * f.same_top.value:.2f} %",
        )
    return table
