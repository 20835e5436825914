"""Peak memory of a long run with the full cache and with a bundle, each measured in a process of its own.

python benchmarks/memory.py BUNDLE --name layers5-5x
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from kvcar.bundle import Bundle
from kvcar.evaluate.memory import MemoryRun, measure_chunk_transient, measure_peak_growth
from kvcar.evaluate.transient import prefill_transient
from kvcar.models.load import load_config
from kvcar.record import Record
from kvcar.runtime.prefill import PREFILL_CHUNK_TOKENS

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
    runs: dict[str, list[MemoryRun]] = {"full": [], "compressed": []}
    transients = []
    for _ in range(repeats):
        runs["full"].append(measure_peak_growth(model, None, tokens, dtype=dtype))
        runs["compressed"].append(measure_peak_growth(model, bundle, tokens, dtype=dtype))
        transients.append(measure_chunk_transient(model, dtype))
    growth = {k: median(run.peak_growth_bytes for run in each) for k, each in runs.items()}
    figures: dict[str, Any] = {
        "full_peak_growth_bytes": growth["full"],
        "compressed_peak_growth_bytes": growth["compressed"],
        "ratio": growth["compressed"] / growth["full"],
        **_explained(bundle, model, tokens, dtype, growth["compressed"], runs["compressed"][0].cache_bytes, transients),
        "runs": {k: [asdict(run) for run in each] for k, each in runs.items()},
    }
    output.mkdir(parents=True, exist_ok=True)
    config = {"model": model, "bundle": name, "tokens": tokens, "repeats": repeats, "dtype": dtype}
    config["chunk"] = PREFILL_CHUNK_TOKENS
    Record("memory", figures, config).write(output / f"memory-{name}.json")
    print(f"{growth['full']:,} -> {growth['compressed']:,} bytes: {figures['ratio']:.2f}")
    print(
        f"peak / (cache + one chunk's transient): {figures['ratio_to_cache_and_derived_transient']:.2f} derived, "
        f"{figures['ratio_to_cache_and_full_transient']:.2f} with the full cache's as measured"
    )


def _explained(
    bundle: Path, model: str, tokens: int, dtype: str, growth: float, cache_bytes: int, transients: list[int]
) -> dict[str, Any]:
    """The peak against cache and one chunk's transient: as derived, and as the full cache needs it on a first chunk."""
    plan, config = Bundle.load(bundle).plan, load_config(model)
    past = max(0, tokens - PREFILL_CHUNK_TOKENS)
    derived, measured = prefill_transient(plan, config, past, _ELEMENT_BYTES[dtype]), median(transients)
    return {
        "derived_transient": derived.as_dict(),
        "full_transient_bytes": measured,
        "full_transient_runs": transients,
        "compressed_peak_less_cache_bytes": growth - cache_bytes,
        "ratio_to_cache_and_derived_transient": growth / (cache_bytes + derived.nbytes),
        "ratio_to_cache_and_full_transient": growth / (cache_bytes + measured),
    }


if __name__ == "__main__":
    typer.run(main)
