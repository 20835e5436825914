"""Attending to a few pages at a decode step: quality and time against the number of pages, at a long context.

python benchmarks/attend_pages.py --bundle BUNDLE --text wikitext-2/test.txt --context 8000 --pages 8 --pages 16 --pages 32
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvcar.bundle import Bundle
from kvcar.cli.attended import page_counts
from kvcar.evaluate.attended import FOLLOWING_TOKENS, attended_figures, measure_attended
from kvcar.fit.text import read_text, token_windows
from kvcar.models.load import load_model
from kvcar.record import Record
from kvcar.runtime.attach import attach
from kvcar.runtime.prefill import PREFILL_CHUNK_TOKENS
from kvcar.runtime.summaries import PageCounts

RESULTS = Path(__file__).parent / "results"


def main(
    bundle: Annotated[Path, typer.Option(help="Folder of a bundle; its name names the records.")],
    text: Annotated[Path, typer.Option()],
    pages: Annotated[
        list[str],
        typer.Option(help="Pages attended to, or one number a layer; may be repeated. All pages come first anyway."),
    ],
    context: Annotated[int, typer.Option(help="Tokens of a window, the following ones included.")] = 8000,
    following: Annotated[
        int, typer.Option(help="Tokens at the end of a window, stepped and scored.")
    ] = FOLLOWING_TOKENS,
    windows: int = 1,
    step_tokens: int = 1,
    model: str = "demo",
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    prefill_chunk: int = PREFILL_CHUNK_TOKENS,
    output: Annotated[Path, typer.Option(help="Folder of the records.")] = RESULTS,
) -> None:
    """Fill one cache for each window, step the rest of it with every number of pages; a record for each number."""
    counts = [count for each in pages if (count := page_counts(each)) is not None]
    source, loaded_bundle, loaded = read_text(text), Bundle.load(bundle), load_model(model, dtype)
    ids = token_windows(loaded.tokenizer, source.text, context, windows)
    with attach(loaded.model, loaded_bundle):
        results = measure_attended(
            loaded.model, loaded_bundle, ids, counts, following, None, step_tokens, prefill_chunk, _tell
        )
    config = {
        "model": model, "bundle": bundle.name, "text": source.name, "text_sha256": source.sha256, "context": context,
        "following": following, "windows": windows, "step_tokens": step_tokens, "prefill_chunk": prefill_chunk,
        "dtype": str(loaded.model.dtype).removeprefix("torch."), "bundle_sha256": loaded_bundle.digest,
        "page_tokens": loaded_bundle.plan.page_tokens, "fitted_on_this_text": source.sha256 == loaded_bundle.fit.text_sha256,
        "fit": loaded_bundle.fit.model_dump(mode="json"),
    }  # fmt: skip
    output.mkdir(exist_ok=True)
    computed = "" if config["dtype"] == "float32" else f"-{config['dtype']}"
    for count, result in results.items():
        name = f"attend-pages-{source.name.split('.')[0]}-{bundle.name}-{context}-{_named(count)}{computed}"
        Record("attend-pages", attended_figures(result), config).write(output / f"{name}.json")
        print(
            f"{name}: KL divergence {result.kl_divergence.value:.5f}, perplexity x {result.perplexity_ratio.value:.4f}, "
            f"{result.seconds_per_step:.3f} s a step (full cache {result.seconds_per_step_full:.3f} s)"
        )


def _named(count: PageCounts | None) -> str:
    if count is None or isinstance(count, int):
        return "all" if count is None else str(count)
    return f"{sum(count) / len(count):g}-by-layer"


def _tell(what: str, done: int, total: int) -> None:
    if done >= total:
        print(what, done, flush=True)


if __name__ == "__main__":
    typer.run(main)
