"""The README's one table: size, codecs, quality and speed by setting. Called by ``tables.py``."""

from __future__ import annotations

import textwrap
from typing import Any

from decode_tables import decode_records
from frontier_tables import codec_cells
from pages import load, markdown

_TEXTS = {"wikitext-2": "WikiText-2", "c4": "C4"}
_CONTEXTS = (512, 4096)
_SPEED = "decode-demo-profiles"
_HEAD = ["setting", "times smaller", "bytes per token", "codecs (MB)", "pays from (tokens)"]


def frontier_block() -> str:
    """Table and the sentences that it needs."""
    by_text = {text: {r["config"]["name"]: r for r in load(f"frontier-{text}-*.json", "frontier")} for text in _TEXTS}
    first = by_text["wikitext-2"]
    (speed,) = decode_records(f"{_SPEED}.json")
    settings = sorted((n for n in first if not n.startswith("stored")), key=lambda n: first[n]["times_smaller"])
    head = [*_HEAD, *(f"KL divergence, {label}" for label in _TEXTS.values()), "perplexity, WikiText-2"]
    head += [f"step at {context:,}" for context in _CONTEXTS]
    rows = [head]
    for name in settings:
        r = first[name]
        rows.append(
            [
                f"`{name}`",
                f"{r['times_smaller']:.2f}",
                f"{r['stored_bytes_per_token']:,.0f}",
                *codec_cells(r),
                *(_divergence(by_text[text].get(name)) for text in _TEXTS),
                f"x {r['perplexity_ratio']:.4f} ± {r['perplexity_ratio_stderr']:.4f}",
                *(_step(speed, name, context) for context in _CONTEXTS),
            ]
        )
    return f"{markdown(rows)}\n\n{_note(first[settings[0]], speed)}"


def _divergence(r: dict[str, Any] | None) -> str:
    return "" if r is None else f"{r['kl_divergence']:.5f} ± {r['kl_divergence_stderr']:.5f}"


def _step(speed: dict[str, Any], name: str, context: int) -> str:
    row = next(at["contenders"] for at in speed["decode"] if at["context"] == context).get(name)
    return "" if row is None else f"{row['ratio_to_full']['median']:.2f}"


def _note(r: dict[str, Any], speed: dict[str, Any]) -> str:
    fit, c = r["config"]["fit"], speed["config"]
    sentences = (
        f"SmolLM2-135M-Instruct (weights dequantised from a Q4_1 file, run in float32), context {r['context']:,}, stepped through the "
        f"cache; fitted on {fit['tokens']:,} tokens of WikiText-2's validation text, C4 and samples of the model. All bytes of the cache's tensors count, against "
        f"{r['full_bytes_per_token']:,.0f} bytes per token of the model's own cache in bfloat16. Codecs exist once, beside the cache, "
        f"counted as they lie in memory: cache and codecs together are smaller from so many tokens on, of all sequences together. KL divergence from the model's "
        f"own output in nats per token. A step is a decode step's time, relative to `DynamicCache` (below 1: faster), on {c['usable_cores']} "
        f"cores ({c['device']}); empty: not measured. Half of what "
        f"is fitted on the model writes itself, as in `kvcar fit`; pages beyond the limit that the fit sets are kept exactly and counted. "
        f"More: [quality](docs/results/frontier.md), [speed](docs/results/decode.md)."
    )
    return textwrap.fill(sentences, 120, break_long_words=False, break_on_hyphens=False)
