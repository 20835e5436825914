"""``docs/results/memory.md`` from the records of ``memory.py``. Called by ``tables.py``."""

from __future__ import annotations

from typing import Any

from pages import load, markdown

_HEAD = """# Peak memory of a long run

Generated from the records in `benchmarks/results/` by `benchmarks/tables.py`. Growth of the resident size from
after a warm-up to the peak of prefill (in chunks of 512) and decode, each run in a process of its own, in turn;
medians, and the least and most of the runs. Weights and codecs are loaded before and left out. The model runs in
float32, so its full cache takes 4 bytes per element.

"As the system sees it" is with glibc's allocator as it comes: it keeps what is freed for what may come next, and as no two
chunks of a prefill have tensors of quite the same sizes, some of that is never used again. "In use" is with
`MALLOC_MMAP_THRESHOLD_=65536` in the environment, which gives tensors back to the system when they are freed; a
program that is short of memory can be run so."""
_TRANSIENT = """A prefill needs, besides the cache, what one chunk of it takes while it passes through the model. Derived
(`benchmarks/transient.py`), that is what is held from the pass's start to its end, and the largest of what exists in one of its
phases only:

- held: hidden states; the mask over past and chunk; the chunk's keys and values of all layers, which stay apart until the pass ends
  because a block may span layers;
- attention of one layer: queries and output in float32, exact keys and values joined, and one tile of scores (four times: as computed,
  masked, less their maximum, exponentiated) with the tile's unpacked codes and decoded keys and values;
- the MLP of one layer; encoding a few pages of all layers; logits of one token.

"Full cache's transient" is measured (in use): the same chunk on an empty full cache, less what that cache holds then. Before these
runs what the warm-up had freed was given back to the system, so that a run cannot hide its transient in it."""


def memory_page() -> str:
    """The whole page."""
    records = load("memory-*.json", "memory")
    return "\n\n".join([_HEAD, _growth(records), *_explained(records)]) + "\n"


def _growth(records: list[dict[str, Any]]) -> str:
    rows = [
        ["record", "tokens", "runs each", "what", "full cache: peak growth (bytes)", "compressed: peak growth (bytes)"]
    ]
    rows[0] += ["ratio", "full cache's tensors", "compressed cache's tensors"]
    for r in records:
        full, small = (r["runs"][k][0]["cache_bytes"] for k in ("full", "compressed"))
        for what, ending, ratio in (("as the system sees it", "", "ratio"), ("in use", "_in_use", "ratio_in_use")):
            rows.append(
                [
                    f"`{r['record']}`",
                    f"{r['config']['tokens']:,}",
                    str(r["config"]["repeats"]),
                    what,
                    _growth_of(r, "full" + ending),
                    _growth_of(r, "compressed" + ending),
                    f"{r[ratio]:.2f}",
                    f"{full:,}",
                    f"{small:,}",
                ]
            )
    return markdown(rows)


def _growth_of(record: dict[str, Any], runs: str) -> str:
    each = [run["peak_growth_bytes"] for run in record["runs"][runs]]
    return f"{record[runs + '_peak_growth_bytes']:,} ({min(each):,} to {max(each):,})"


def _explained(records: list[dict[str, Any]]) -> list[str]:
    rows = [
        ["record", "cache + derived transient (bytes)", "peak growth in use / that", "as the system sees it / that"]
    ]
    rows[0] += ["full cache's transient (bytes)"]
    parts = [["record", "held in a pass (bytes)", "one phase (bytes)"]]
    for r in records:
        cache, derived = r["runs"]["compressed"][0]["cache_bytes"], r["derived_transient"]
        rows.append(
            [
                f"`{r['record']}`",
                f"{cache:,} + {derived['bytes']:,}",
                f"{r['ratio_in_use_to_cache_and_derived_transient']:.2f}",
                f"{r['ratio_to_cache_and_derived_transient']:.2f}",
                f"{r['full_transient_bytes']:,.0f}",
            ]
        )
        parts.append([f"`{r['record']}`", *(_listed(derived[k]) for k in ("held", "phases"))])
    return ["## What the peak is made of", markdown(rows), markdown(parts), _TRANSIENT]


def _listed(each: dict[str, int]) -> str:
    return ", ".join(f"{what}: {size:,}" for what, size in each.items())
