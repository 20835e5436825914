"""``docs/results/serve-stored.md`` from the records of ``serve_stored.py``. Called by ``tables.py``."""

from __future__ import annotations

from statistics import median
from typing import Any

from pages import load, markdown

_HEAD = """# Stored prefixes in vLLM

Generated from the records in `benchmarks/results/` by `benchmarks/tables.py`. Demo model in float32 on vLLM's CPU build, one thread; a prefix and 32 tokens of
WikiText-2's test text. "Prefill" and "from records" are the time to the first token with nothing resident, medians; CPU seconds are of all threads of the process, and say
more where other processes ran beside it. Bytes are those of all record files, against the model's own cache in bfloat16."""
_TOKENS = """Greedy tokens after the prefix: those from records are compared with those of the same prefix when it is still resident in vLLM, with those of transformers after the same
records were decoded without vLLM, and with those after an exact prefix, from which a lossy codec departs."""


def serve_stored_page() -> str:
    """The whole page."""
    records = load("serve-stored-*.json", "serve-stored")
    sizes = [
        [
            "record",
            "prefix",
            "bytes",
            "times smaller",
            "prefill (CPU s)",
            "from records (CPU s)",
            "times faster",
            "by the clock (s)",
        ]
    ]
    tokens = [
        ["record", "tokens", "as resident in vLLM", "as transformers from the records", "as after an exact prefix"]
    ]
    for r in records:
        sizes.append(_sizes(r))
        same = [f"the first {r[f'equal_to_{other}']}" for other in ("resident", "transformers", "exact")]
        tokens.append([f"`{r['record']}`", str(r["new_tokens"]), *same])
    return "\n\n".join([_HEAD, markdown(sizes), _TOKENS, markdown(tokens)]) + "\n"


def _sizes(r: dict[str, Any]) -> list[str]:
    cpu, wall = ([median(r[what][f"{clock}_seconds"]) for what in ("prefill", "loading")] for clock in ("cpu", "wall"))
    return [
        f"`{r['record']}`", f"{r['config']['prefix']:,}", f"{r['file_bytes']:,}", f"{r['times_smaller']:.1f}",
        f"{cpu[0]:.1f}", f"{cpu[1]:.1f}", f"{r['times_faster_cpu']:.1f}", f"{wall[0]:.0f} and {wall[1]:.0f}",
    ]  # fmt: skip
