"""What products in integers cost in quality: decode steps by the C kernel with decoders in 8 bits and with float ones.

python benchmarks/rounding.py BUNDLE wikitext-2/test.txt
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from speed.device import device_config, use_threads
from transformers import DynamicCache

from kvcar.bundle import Bundle
from kvcar.cache.attach import attach, prefill
from kvcar.cache.cache import KVCarCache
from kvcar.errors import KVCarError
from kvcar.evaluate.fidelity import TokenScores, mean_of, ratio_of, step_logits
from kvcar.kernels.attend import cpu
from kvcar.models.load import LoadedModel, load_model
from kvcar.record import Record
from kvcar.text import read_text, token_windows

RESULTS = Path(__file__).parent / "results"


def main(
    bundle: Annotated[Path, typer.Argument(help="Folder of a bundle; its name names the record.")],
    text: Annotated[Path, typer.Argument()],
    context: Annotated[int, typer.Option(help="Tokens of a window, the following ones included.")] = 4096,
    following: Annotated[int, typer.Option(help="Tokens at the end of a window, stepped one by one.")] = 256,
    windows: int = 4,
    model: str = "demo",
    threads: int | None = None,
    output: Annotated[Path, typer.Option(help="Folder of the record.")] = RESULTS,
) -> None:
    """Step the ends of the same windows with either kind of decoders; one record."""
    use_threads(threads)
    source, loaded = read_text(text), load_model(model)
    ids = token_windows(loaded.tokenizer, source.text, context, windows)
    found = {name: _measure(loaded, bundle, ids, following, name == "int8") for name in ("float32", "int8")}
    for name, each in found.items():
        print(f"{name}: KL divergence {each['kl_divergence']:.6f} ± {each['kl_divergence_stderr']:.6f}")
    config = {
        "model": model, "bundle": bundle.name, "bundle_sha256": Bundle.from_pretrained(bundle).digest, "text": source.name,
        "text_sha256": source.sha256, "context": context, "following": following, "windows": windows,
        **device_config(ids.device),
    }  # fmt: skip
    output.mkdir(parents=True, exist_ok=True)
    Record("rounding", {"decoders": found}, config).write(output / f"rounding-{bundle.name}.json")


@torch.no_grad()
def _measure(loaded: LoadedModel, folder: Path, ids: Any, following: int, in_8_bits: bool) -> dict[str, float]:
    """Score the last tokens of each window. A bundle that is loaded anew has kernels' jobs of its own, made as the switch says."""
    cpu.IN_8_BITS, bundle, model = in_8_bits, Bundle.from_pretrained(folder), loaded.model
    scores = TokenScores()
    with attach(model, bundle):
        for window in ids:
            caches = (KVCarCache(bundle), DynamicCache(config=model.config))
            start = len(window) - following
            for cache in caches:
                prefill(model, cache, window[None, :start])
            for place in range(start, len(window) - 1):
                logits, full = (step_logits(model, window[place : place + 1], cache) for cache in caches)
                scores.add(logits, full, window[place + 1 : place + 2])
    nll, nll_full = torch.cat(scores.nll), torch.cat(scores.nll_full)
    estimates = {
        "kl_divergence": mean_of(torch.cat(scores.divergence)),
        "same_top": mean_of(torch.cat(scores.same_top)),
        "perplexity": mean_of(nll).exponential(),
        "perplexity_full": mean_of(nll_full).exponential(),
        "perplexity_ratio": ratio_of(nll, nll_full),
    }
    figures = {name: estimate.value for name, estimate in estimates.items()}
    return figures | {f"{name}_stderr": estimate.stderr for name, estimate in estimates.items()}


if __name__ == "__main__":
    try:
        typer.run(main)
    except KVCarError as error:
        raise SystemExit(f"error: {error}") from None
