"""``docs/results/matrix.md`` from the records of ``matrix.py``. Called by ``tables.py``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pages import load, markdown, model_in_words

_HEAD = """# How codecs carry over

Generated from the records in `benchmarks/results/` by `benchmarks/tables.py`. Rows are kinds of text, columns are what a codec was
fitted on, all to the same size; each is stepped through the cache by the kernels that users get, beside the same model with its
full cache (`benchmarks/matrix.py`). No test text was fitted on."""


def matrix_pages() -> dict[str, str]:
    """File name below ``docs/results`` -> content; nothing where there are no records."""
    records = load("matrix-*.json", "matrix")
    if not records:
        return {}
    return {"matrix.md": "\n\n".join([_HEAD, *(part for r in records for part in _sections(r))]) + "\n"}


def _sections(r: dict[str, Any]) -> list[str]:
    config = r["config"]
    fits = "; ".join(f"*{name}*: {fit['tokens']:,} tokens of {fit['text']}" for name, fit in config["fits"].items())
    return [
        f"## `{r['record']}`",
        f"{model_in_words(config['model'])}, {config['times_smaller']:g} times smaller at 4,096 tokens, context {config['context']:,}, windows: "
        f"{config['windows']}. Fitted on {fits}.",
        "KL divergence, nats per token, ± one standard error:",
        _table(r, lambda f: f"{f['kl_divergence']:.4f} ± {f['kl_divergence_stderr']:.4f}"),
        "Smallest of the worst hundredth of the tokens' divergences:",
        _table(r, lambda f: f"{f['kl_divergence_worst_1_percent']:.3f}"),
        "Same top-1 token, percent:",
        _table(r, lambda f: f"{100 * f['same_top']:.1f}"),
        "Coded tokens that are kept exactly, as their pages would have cost too much, percent:",
        _table(r, lambda f: f"{100 * f['finer_page_share']:.1f}"),
    ]


def _table(r: dict[str, Any], cell: Callable[[dict[str, Any]], str]) -> str:
    columns = list(r["config"]["fits"])
    rows = [["text", *columns]]
    rows += [[kind, *(cell(found[name]) for name in columns)] for kind, found in r["kinds"].items()]
    return markdown(rows)
