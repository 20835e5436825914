"""Peak memory of a long run with the full cache and with a bundle, each measured in a process of its own.

python benchmarks/memory.py BUNDLE --name layers5-5x
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from kvcar.evaluate.memory import measure_peak_growth
from kvcar.record import Record

RESULTS = Path(__file__).parent / "results"


def main(
    bundle: Path, name: Annotated[str, typer.Option()], model: str = "demo", tokens: int = 7000, repeats: int = 3
) -> None:
    """Measure ``repeats`` times in turn; the record holds every run and the medians' ratio."""
    runs = {"full": [], "compressed": []}
    for _ in range(repeats):
        runs["full"].append(measure_peak_growth(model, None, tokens))
        runs["compressed"].append(measure_peak_growth(model, bundle, tokens))
    growth = {k: sorted(run.peak_growth_bytes for run in each)[repeats // 2] for k, each in runs.items()}
    figures = {
        "full_peak_growth_bytes": growth["full"],
        "compressed_peak_growth_bytes": growth["compressed"],
        "ratio": growth["compressed"] / growth["full"],
        "runs": {k: [asdict(run) for run in each] for k, each in runs.items()},
    }
    RESULTS.mkdir(exist_ok=True)
    config = {"model": model, "bundle": name, "tokens": tokens, "repeats": repeats, "dtype": "float32"}
    Record("memory", figures, config).write(RESULTS / f"memory-{name}.json")
    print(f"{growth['full']:,} -> {growth['compressed']:,} bytes: {figures['ratio']:.2f}")


if __name__ == "__main__":
    typer.run(main)
