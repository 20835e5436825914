"""The model card of a bundle: what it is, how it was fitted, what it saves and what it costs."""

from __future__ import annotations

from ..bundle import Bundle
from ..evaluate.fidelity import Fidelity
from ..sizes import compressed_size, full_size
from .plan_table import summarise_blocks

_LENGTHS = (512, 1024, 4096, 16384, 65536)


def model_card(bundle: Bundle, check: Fidelity | None) -> str:
    """Markdown of a bundle's ``README.md``.

    Args:
        bundle: what the card is about.
        check: quality on the part of the text that was held back from the fit, or None if it was not measured.
    """
    sections = [_head(bundle), _sizes(bundle), _quality(bundle, check), _plan(bundle), _use(bundle)]
    return "\n\n".join(sections) + "\n"


def _head(bundle: Bundle) -> str:
    fit = bundle.fit
    return (
        f"# Compressed KV cache for {bundle.model.name}\n\n"
        f"A kvcar bundle, fitted {fit.date} for `{bundle.model.architecture}` weights "
        f"`{bundle.model.fingerprint[:12]}` on {fit.tokens:,} tokens of {fit.text} (SHA-256 `{fit.text_sha256[:12]}`) in "
        f"windows of {fit.context}, with kvcar {fit.kvcar_version}, torch {fit.torch_version}, transformers "
        f"{fit.transformers_version}."
    )


def _sizes(bundle: Bundle) -> str:
    geometry = bundle.plan.geometry
    full, small = full_size(geometry), compressed_size(bundle.plan, model_bytes=2)
    rows = ["| tokens | full cache, bfloat16 (bytes) | this cache (bytes) | times smaller |", "|---|---|---|---|"]
    for tokens in _LENGTHS:
        if tokens <= geometry.max_positions:
            a, b = full(tokens, 1), small(tokens, 1)
            rows.append(f"| {tokens:,} | {a:,} | {b:,} | {a / b:.2f} |")
    note = (
        f"One sequence; sinks ({bundle.plan.sinks} tokens), window ({bundle.plan.window}), unfilled room and position tables "
        f"counted. The codecs' own parameters take {bundle.codec_bytes:,} bytes, once for all sequences."
    )
    return "## Size\n\n" + "\n".join(rows) + "\n\n" + note


def _quality(bundle: Bundle, check: Fidelity | None) -> str:
    if check is None:
        return "## Quality\n\nNot measured when the bundle was written; `kvcar eval` measures it."
    return (
        "## Quality\n\n"
        f"Stepped through the cache on {check.tokens:,} tokens of {bundle.fit.text} that were held back from the fit, at "
        f"context {check.context:,}, against the same model with its full cache:\n\n"
        "| figure | value | standard error |\n|---|---|---|\n"
        f"| KL divergence (nats per token) | {check.kl_divergence.value:.5f} | {check.kl_divergence.stderr:.5f} |\n"
        f"| same top-1 token | {100 * check.same_top.value:.2f} % | {100 * check.same_top.stderr:.2f} |\n"
        f"| perplexity, full cache | {check.perplexity_full.value:.3f} | {check.perplexity_full.stderr:.3f} |\n"
        f"| perplexity, this cache | {check.perplexity.value:.3f} | {check.perplexity.stderr:.3f} |\n"
        f"| ratio of the two | {check.perplexity_ratio.value:.4f} | {check.perplexity_ratio.stderr:.4f} |\n"
        f"| times smaller at this context | {check.times_smaller:.2f} | |"
    )


def _plan(bundle: Bundle) -> str:
    rows = [
        "| block | codec | kind | layers | heads | width | latents | bits per element |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rows += [
        f"| {b.index} | {b.codec} | {b.kind} | {b.layers} | {b.heads} | {b.width} | {b.latents} | {b.bits_per_element:.2f} |"
        for b in summarise_blocks(bundle.plan)
    ]
    return "## Plan\n\n" + "\n".join(rows)


def _use(bundle: Bundle) -> str:
    return (
        "## Use\n\n```python\nimport kvcar\n\n"
        f'loaded = kvcar.load_model("{bundle.model.name}")\n'
        'with kvcar.attach(loaded.model, "path/to/this/folder"):\n'
        '    ids = loaded.tokenizer("Once upon a time", return_tensors="pt").to(loaded.model.device)\n'
        "    print(loaded.tokenizer.decode(loaded.model.generate(**ids, max_new_tokens=64)[0]))\n```"
    )
