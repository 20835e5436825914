"""Peak memory of a long run with the full cache and with a bundle, each measured in a process of its own.

Twice: as the system sees it, and of memory in use alone, without what the allocator keeps.

python benchmarks/memory.py BUNDLE --name layers5-5x
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from peak_memory import MemoryRun, measure_chunk_transient, measure_peak_growth
from transient import prefill_transient

from kvcar.bundle import Bundle
from kvcar.cache.attach import PREFILL_CHUNK_TOKENS
from kvcar.models.load import load_config
from kvcar.record import Record

RESULTS = Path(__file__).parent / "results"
_ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def main(
    bundle: Path,
    name: Annotated[str, typer.Option()],
    model: str = "demo",
    tokens: int = 7000,
    repeats: int = 3,
    dtype: Annotated[str, typer.Option(help="What the model computes in.")] = "float32",
    output: Annotated[Path, typer.Option(help="Folder of the record.")] = RESULTS,
) -> None:
    """Measure ``repeats`` times in turn; the record holds every run, medians, and what a chunk's transient explains."""
    runs: dict[str, list[MemoryRun]] = {"full": [], "compressed": [], "full_in_use": [], "compressed_in_use": []}
    transients = []
    for _ in range(repeats):
        for in_use, ending in ((False, ""), (True, "_in_use")):
            runs["full" + ending].append(measure_peak_growth(model, None, tokens, dtype=dtype, in_use_only=in_use))
            small = measure_peak_growth(model, bundle, tokens, dtype=dtype, in_use_only=in_use)
            runs["compressed" + ending].append(small)
        transients.append(measure_chunk_transient(model, dtype, in_use_only=True))
    growth = {k: median(run.peak_growth_bytes for run in each) for k, each in runs.items()}
    figures: dict[str, Any] = {
        **{f"{k}_peak_growth_bytes": each for k, each in growth.items()},
        "ratio": growth["compressed"] / growth["full"],
        "ratio_in_use": growth["compressed_in_use"] / growth["full_in_use"],
        **_explained(bundle, model, tokens, dtype, growth, runs["compressed"][0].cache_bytes, transients),
        "runs": {k: [asdict(run) for run in each] for k, each in runs.items()},
    }
    output.mkdir(parents=True, exist_ok=True)
    config = {"model": model, "bundle": name, "tokens": tokens, "repeats": repeats, "dtype": dtype}
    config["chunk"] = PREFILL_CHUNK_TOKENS
    Record("memory", figures, config).write(output / f"memory-{name}.json")
    print(f"{growth['full']:,} -> {growth['compressed']:,} bytes: {figures['ratio']:.2f}")
    print(
        f"peak / (cache + one chunk's derived transient): {figures['ratio_to_cache_and_derived_transient']:.2f}, "
        f"of memory in use {figures['ratio_in_use_to_cache_and_derived_transient']:.2f}"
    )


def _explained(
    bundle: Path,
    model: str,
    tokens: int,
    dtype: str,
    growth: dict[str, float],
    cache_bytes: int,
    transients: list[int],
) -> dict[str, Any]:
    """Peaks against cache and one chunk's derived transient; and what a first chunk needs with the full cache."""
    plan, config = Bundle.from_pretrained(bundle).plan, load_config(model)
    past = max(0, tokens - PREFILL_CHUNK_TOKENS)
    derived = prefill_transient(plan, config, past, _ELEMENT_BYTES[dtype])
    expected = cache_bytes + derived.nbytes
    return {
        "derived_transient": derived.as_dict(),
        "full_transient_bytes": median(transients),
        "full_transient_runs": transients,
        "ratio_to_cache_and_derived_transient": growth["compressed"] / expected,
        "ratio_in_use_to_cache_and_derived_transient": growth["compressed_in_use"] / expected,
    }


if __name__ == "__main__":
    typer.run(main)
