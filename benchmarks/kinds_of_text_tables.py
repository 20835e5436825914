"""``docs/results/kinds-of-text.md`` from the records of ``kinds_of_text.py``. Called by ``tables.py``."""

from __future__ import annotations

from typing import Any

from pages import load, markdown, model_in_words

_HEAD = """# Kinds of text

Generated from the records in `benchmarks/results/` by `benchmarks/tables.py`. Each kind of text stepped through the cache by the kernels
that users get, against the same model with its full cache (`benchmarks/kinds_of_text.py`). KL divergence in nats per token; ± is one
standard error. Bytes count everything but the codecs, which are named beside. Finer pages are kept exactly, as their codes would
have cost too much."""


def kinds_of_text_page() -> str:
    """The page, whatever records there are of it."""
    return "\n\n".join([_HEAD, *map(_section, load("kinds-of-text*.json", "kinds-of-text"))]) + "\n"


def _section(r: dict[str, Any]) -> str:
    config, fit = r["config"], r["config"]["fit"]
    rows = [
        [
            "kind",
            "KL divergence",
            "worst hundredth above",
            "same top-1",
            "perplexity ratio",
            "times smaller",
            "finer pages",
        ]
    ]
    for kind, f in r["kinds"].items():
        rows.append([
            kind, f"{f['kl_divergence']:.4f} ± {f['kl_divergence_stderr']:.4f}", f"{f['kl_divergence_worst_1_percent']:.3f}",
            f"{100 * f['same_top']:.1f} %", f"{f['perplexity_ratio']:.4f} ± {f['perplexity_ratio_stderr']:.4f}",
            f"{f['times_smaller']:.2f}", f"{100 * f['finer_page_share']:.1f} %",
        ])  # fmt: skip
    prompts = [["prompt", "KL divergence", "same top-1", "finer pages"]]
    for kind, f in r["prompts"].items():
        prompts.append([
            kind, f"{f['kl_divergence']:.4f}", f"{100 * f['same_top']:.1f} %", f"{100 * f['finer_page_share']:.0f} %"
        ])  # fmt: skip
    limit = config["max_page_cost"]
    return "\n\n".join([
        f"## `{config['name']}`",
        f"{model_in_words(config['model'])}, fitted to {config['times_smaller']:.2f} times smaller at 4,096 tokens on {fit['tokens']:,} tokens "
        f"of {fit['text']}, effects measured on {fit['options']['effect_tokens']:,}; codecs of {config['codec_bytes'] / 1e6:.1f} MB; pages that cost more than "
        f"{limit if isinstance(limit, str | None) else format(limit, '.4f')} nats a token are finer. Context {config['context']:,}, windows: "
        f"{config['windows']}. Record: `{r['record']}`.",
        markdown(rows),
        f"Prompts of {config['prompt_tokens']} tokens in chunks of 64, scored from token {config['first_scored']} on:",
        markdown(prompts),
    ])  # fmt: skip
