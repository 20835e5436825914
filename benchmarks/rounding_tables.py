"""A section of ``docs/results/decode.md`` from the records of ``rounding.py``. Called by ``decode_tables.py``."""

from __future__ import annotations

from typing import Any

from pages import load, markdown

_READING = """The C kernel multiplies codes by decoders in 8 bits and sums values in integers. The same windows were stepped so and in floats; KL divergence from the full cache in nats per token, ± is one standard error."""


def rounding_sections() -> list[str]:
    """All sections; none without records."""
    records = load("rounding-*.json", "rounding")
    return ["## What 8-bit decoders cost", _READING, *(_table(r) for r in records)] if records else []


def _table(r: dict[str, Any]) -> str:
    rows = [["decoders", "KL divergence", "same top-1", "perplexity ratio"]]
    for name, each in r["decoders"].items():
        rows.append(
            [
                name,
                f"{each['kl_divergence']:.5f} ± {each['kl_divergence_stderr']:.5f}",
                f"{100 * each['same_top']:.1f} %",
                f"{each['perplexity_ratio']:.4f} ± {each['perplexity_ratio_stderr']:.4f}",
            ]
        )
    c = r["config"]
    note = (
        f"`{c['bundle']}` on {c['text']}, {c['windows']} windows of {c['context']:,} tokens, the last {c['following']} stepped one by one; "
        f"{c['device']}. Record: `{r['record']}`"
    )
    return f"{markdown(rows)}\n\n{note}"
