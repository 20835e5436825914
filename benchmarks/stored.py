"""A stored context: its bytes, the times to save and load it against computing it again, and the quality of going on.

python benchmarks/stored.py BUNDLE wikitext-2/test.txt --name all-layers
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Annotated

import typer

from kvcar.bundle import Bundle
from kvcar.cache.attach import PREFILL_CHUNK_TOKENS, attach
from kvcar.context import check_store
from kvcar.evaluate.stored import continuation_figures, measure_continuation, time_context
from kvcar.models.load import load_model
from kvcar.record import Record
from kvcar.text import read_text, token_windows

RESULTS = Path(__file__).parent / "results"


def main(
    bundle: Path,
    text: Path,
    name: Annotated[str, typer.Option(help="Of the record.")],
    model: str = "demo",
    context: int = 4096,
    following: int = 512,
    windows: int = 4,
    repeats: int = 3,
    prefill_chunk: int = PREFILL_CHUNK_TOKENS,
    output: Annotated[Path, typer.Option(help="Folder of the record.")] = RESULTS,
) -> None:
    """Measure quality over ``windows`` windows, times ``repeats`` times in turn on the first; one record for both."""
    check_store()
    source, loaded_bundle, loaded = read_text(text), Bundle.from_pretrained(bundle), load_model(model)
    ids = token_windows(loaded.tokenizer, source.text, context + following + 1, windows)
    with attach(loaded.model, loaded_bundle) as attachment:
        times = time_context(loaded.model, ids[:1, :context], attachment.new_cache, repeats, prefill_chunk)
        quality = measure_continuation(
            loaded.model, ids, context, attachment.new_cache, prefill_chunk, on_window=lambda n: print("window", n)
        )
    seconds = {f"{what}_seconds": list(each) for what, each in asdict(times).items()}
    medians = {f"{what}_seconds_median": median(each) for what, each in asdict(times).items()}
    figures = {**continuation_figures(quality), **medians, "runs": seconds}
    config = {
        "model": model, "bundle": name, "text": source.name, "text_sha256": source.sha256, "context": context,
        "following": following, "windows": windows, "repeats": repeats, "prefill_chunk": prefill_chunk,
        "dtype": str(loaded.model.dtype).removeprefix("torch."), "bundle_sha256": loaded_bundle.digest,
        "fit": loaded_bundle.fit.model_dump(mode="json"),
    }  # fmt: skip
    output.mkdir(exist_ok=True)
    Record("stored", figures, config).write(output / f"stored-{name}.json")
    print(
        f"{quality.file_bytes:,.0f} bytes, {quality.times_smaller:.1f} times smaller; KL divergence "
        f"{quality.kl_divergence.value:.4f}, perplexity x {quality.perplexity_ratio.value:.4f}; prefill "
        f"{medians['prefill_full_seconds_median']:.1f} s, save {medians['save_seconds_median']:.1f} s, load "
        f"{medians['load_seconds_median']:.1f} s"
    )


if __name__ == "__main__":
    typer.run(main)
