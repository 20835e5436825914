"""Fidelity as JSON figures and as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from ..evaluate.fidelity import Fidelity


def fidelity_figures(f: Fidelity) -> dict[str, Any]:
    """Figures for a record; names carry units, divergences are in nats per token."""
    return {
        "perplexity": f.perplexity.value,
        "perplexity_stderr": f.perplexity.stderr,
        "perplexity_full": f.perplexity_full.value,
        "perplexity_full_stderr": f.perplexity_full.stderr,
        "perplexity_ratio": f.perplexity_ratio.value,
        "perplexity_ratio_stderr": f.perplexity_ratio.stderr,
        "kl_divergence": f.kl_divergence.value,
        "kl_divergence_stderr": f.kl_divergence.stderr,
        "kl_divergence_worst_1_percent": f.kl_divergence_worst_1_percent,
        "same_top": f.same_top.value,
        "same_top_stderr": f.same_top.stderr,
        "window_kl_divergences": list(f.window_kl_divergences),
        "stored_bytes": f.stored_bytes,
        "full_bytes": f.full_bytes,
        "stored_bytes_per_token": f.stored_bytes_per_token,
        "full_bytes_per_token": f.full_bytes_per_token,
        "times_smaller": f.times_smaller,
        "tokens": f.tokens,
        "context": f.context,
        "windows": f.windows,
    }


def fidelity_table(results: Mapping[str, Fidelity]) -> Table:
    """A row for each cache."""
    first = next(iter(results.values()))
    table = Table(
        title=f"stepped through the cache, {first.windows} windows of {first.context:,} tokens", title_justify="left"
    )
    table.add_column("cache")
    for heading in ("times smaller", "bytes/token", "perplexity", "ratio to full", "KL divergence", "same top-1"):
        table.add_column(heading, justify="right")
    full = first.perplexity_full
    table.add_row(
        "full (bfloat16 bytes)",
        "1.00",
        f"{first.full_bytes_per_token:,.0f}",
        f"{full.value:.3f} ± {full.stderr:.3f}",
        "1",
        "0",
        "100 %",
    )
    for name, f in results.items():
        table.add_row(
            name,
            f"{f.times_smaller:.2f}",
            f"{f.stored_bytes_per_token:,.0f}",
            f"{f.perplexity.value:.3f}",
            f"{f.perplexity_ratio.value:.4f} ± {f.perplexity_ratio.stderr:.4f}",
            f"{f.kl_divergence.value:.5f} ± {f.kl_divergence.stderr:.5f}",
            f"{100 * f.same_top.value:.2f} %",
        )
    return table
