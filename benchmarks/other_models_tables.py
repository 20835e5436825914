"""``docs/results/other-models.md`` and a block of the README from the records of ``other_models.py``. Called by ``tables.py``."""

from __future__ import annotations

import textwrap
from typing import Any

from pages import load, markdown

_HEAD = """# Models beside the demo model

Generated from the records in `benchmarks/results/` by `benchmarks/tables.py`. Stepped through the cache in chunks of 64 against the same
model with its full cache (`benchmarks/other_models.py`); the quantised caches of transformers step through the same tokens. KL divergence in nats
per token; ± is one standard error. Bytes are those of the cache's tensors; codecs are named beside."""
_KINDS = {"wikitext-2": "WikiText-2", "c4": "C4", "german": "German"}


def other_models_page() -> str:
    """The page, whatever records there are of it."""
    return "\n\n".join([_HEAD, *map(_section, load("other-model-*.json", "other-model"))]) + "\n"


def other_models_block() -> str:
    """The README's table: each model and kind of text on which rivals were measured, and the sentences that it needs."""
    records = load("other-model-*.json", "other-model")
    compared = [r for r in records if any(len(rows) > 1 for rows in r["kinds"].values())]
    return "\n\n".join(f"{markdown(_beside(r))}\n\n{_note(r)}" for r in compared)


def _beside(r: dict[str, Any]) -> list[list[str]]:
    kinds = {kind: rows for kind, rows in r["kinds"].items() if len(rows) > 1}
    rows = [["cache", "times smaller", *(f"KL divergence, perplexity on {_KINDS.get(kind, kind)}" for kind in kinds)]]
    for name in next(iter(kinds.values()), {}):
        own = [rows_of[name] for rows_of in kinds.values()]
        cells = [f"{f['kl_divergence']:.4f}, x {f['perplexity_ratio']:.3f}" for f in own]
        rows.append([f"`{name}`", f"{min(f['times_smaller'] for f in own):.2f}", *cells])
    return rows


def _note(r: dict[str, Any]) -> str:
    config, fit = r["config"], r["config"]["fit"]
    said = (
        f"{config['title']} in {config['dtype']}, `balanced` fitted to 8 times smaller at 4,096 tokens on {fit['tokens']:,} tokens of "
        f"{fit['text']}, beside the 4-bit caches of transformers; context {config['context']:,}, windows of each text: {config['windows']}; "
        f"codecs of {config['codec_bytes'] / 1e6:.1f} MB beside. More: [other models](docs/results/other-models.md)."
    )
    return textwrap.fill(said, 120, break_long_words=False, break_on_hyphens=False)


def _section(r: dict[str, Any]) -> str:
    config, fit = r["config"], r["config"]["fit"]
    rows = [["kind", "cache", "KL divergence", "worst hundredth above", "same top-1", "perplexity ratio", "bytes per token",
             "times smaller", "finer pages"]]  # fmt: skip
    for kind, contenders in r["kinds"].items():
        for name, f in contenders.items():
            rows.append([
                str(_KINDS.get(kind, kind)), f"`{name}`", f"{f['kl_divergence']:.4f} ± {f['kl_divergence_stderr']:.4f}",
                f"{f['kl_divergence_worst_1_percent']:.3f}", f"{100 * f['same_top']:.1f} %",
                f"{f['perplexity_ratio']:.4f} ± {f['perplexity_ratio_stderr']:.4f}", f"{f['stored_bytes_per_token']:,.0f}",
                f"{f['times_smaller']:.2f}", f"{100 * f.get('finer_page_share', 0.0):.1f} %",
            ])  # fmt: skip
    pays = config["pays_from_tokens"]
    return "\n\n".join([
        f"## {config['title']}, context {config['context']:,}",
        f"In {config['dtype']}; fitted to {config['times_smaller']:.2f} times smaller at 4,096 tokens on {fit['tokens']:,} tokens of "
        f"{fit['text']}. Codecs of {config['codec_bytes'] / 1e6:.1f} MB, which pay "
        f"{'never' if pays is None else f'from {pays:,} tokens on, of all sequences together'}. Context {config['context']:,}, windows: "
        f"{config['windows']}. Record: `{r['record']}`.",
        markdown(rows),
    ])  # fmt: skip
