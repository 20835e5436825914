"""The model card of a bundle: what it is, how it was fitted, what it saves and what it costs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..geometry import BFLOAT16_BYTES
from ..plan import Plan
from ..sizes import codecs_in_words, stored_bytes
from .origin import FitProvenance, ModelIdentity
from .summary import summarise_blocks

_LENGTHS = (512, 1024, 4096, 16384, 65536)


def model_card(
    plan: Plan, model: ModelIdentity, fit: FitProvenance, figures: Mapping[str, Any], codec_bytes: int
) -> str:
    """Write the Markdown of a bundle's ``README.md``; arguments as those of ``Bundle``."""
    sections = [_metadata(model), _head(model, fit), _sizes(plan, codec_bytes), _quality(fit, figures), _plan(plan)]
    return "\n\n".join([*sections, _use(model)]) + "\n"


def _metadata(model: ModelIdentity) -> str:
    """What the hub reads: the library, and the model where its name is one of the hub's."""
    lines = ["library_name: kvcar", "tags:", "- kv-cache", "- compression"]
    if model.name.count("/") == 1 and not model.name.startswith((".", "/", "~")):
        lines.append(f"base_model: {model.name.partition('@')[0]}")
    return "\n".join(["---", *lines, "---"])


def _head(model: ModelIdentity, fit: FitProvenance) -> str:
    made = f"on {fit.tokens:,} tokens of {fit.text} (SHA-256 `{fit.text_sha256[:12]}`) in windows of {fit.context}, "
    return (
        f"# Compressed KV cache for {model.name}\n\n"
        f"A kvcar bundle, made {fit.date} for `{model.architecture}` weights `{model.fingerprint[:12]}` "
        f"{made if fit.tokens else ''}with kvcar {fit.kvcar_version}, torch {fit.torch_version}, transformers "
        f"{fit.transformers_version}."
    )


def _sizes(plan: Plan, codec_bytes: int) -> str:
    rows = ["| tokens | full cache, bfloat16 (bytes) | this cache (bytes) | times smaller |", "|---|---|---|---|"]
    for tokens in _LENGTHS:
        if tokens <= plan.geometry.max_positions:
            full, stored = plan.geometry.full_bytes(tokens), stored_bytes(plan, tokens, BFLOAT16_BYTES)
            rows.append(f"| {tokens:,} | {full:,} | {stored:,} | {full / stored:.2f} |")
    note = (
        f"One sequence; sinks ({plan.sinks} tokens), window ({plan.window}), unfilled room and position tables counted. "
        f"Beside the cache, {codecs_in_words(plan, codec_bytes)}."
    )
    return "## Size\n\n" + "\n".join(rows) + "\n\n" + note


def _quality(fit: FitProvenance, figures: Mapping[str, Any]) -> str:
    found = figures.get("held_out")
    if found is None:
        return "## Quality\n\nNot measured when the bundle was written; `kvcar eval` measures it."
    return (
        "## Quality\n\n"
        f"Stepped through the cache on {found['tokens']:,} tokens of {fit.text} that were held out from the fit, at "
        f"context {found['context']:,}, against the same model with its full cache:\n\n"
        "| figure | value | standard error |\n|---|---|---|\n"
        f"| KL divergence (nats per token) | {found['kl_divergence']:.5f} | {found['kl_divergence_stderr']:.5f} |\n"
        f"| same top-1 token | {100 * found['same_top']:.2f} % | {100 * found['same_top_stderr']:.2f} |\n"
        f"| perplexity, full cache | {found['perplexity_full']:.3f} | {found['perplexity_full_stderr']:.3f} |\n"
        f"| perplexity, this cache | {found['perplexity']:.3f} | {found['perplexity_stderr']:.3f} |\n"
        f"| ratio of the two | {found['perplexity_ratio']:.4f} | {found['perplexity_ratio_stderr']:.4f} |\n"
        f"| times smaller at this context | {found['times_smaller']:.2f} | |\n"
        f"| coded tokens kept exactly, as their pages would cost too much | {100 * found.get('finer_page_share', 0):.1f} % | |"
    )


def _plan(plan: Plan) -> str:
    rows = [
        "| block | codec | kind | layers | heads | width | latents | bits per element |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rows += [
        f"| {b.index} | {b.codec} | {b.kind} | {b.layers} | {b.heads} | {b.width} | {b.latents} | {b.bits_per_element:.2f} |"
        for b in summarise_blocks(plan)
    ]
    return "## Plan\n\n" + "\n".join(rows)


def _use(model: ModelIdentity) -> str:
    return (
        "## Use\n\n```python\nimport kvcar\n\n"
        f'loaded = kvcar.load_model("{model.name}")\n'
        'bundle = kvcar.Bundle.from_pretrained("path/to/this/folder")  # or its name on the hub\n'
        "with kvcar.attach(loaded.model, bundle):\n"
        '    ids = loaded.tokenizer("Once upon a time", return_tensors="pt").to(loaded.model.device)\n'
        "    print(loaded.tokenizer.decode(loaded.model.generate(**ids, max_new_tokens=64)[0]))\n```"
    )
