"""Quality and bytes of several settings on the demo model, through the same commands that a user types.

python benchmarks/fidelity.py wikitext-2/valid.txt wikitext-2/test.txt
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path
from typing import Annotated

import typer

RESULTS = Path(__file__).parent / "results"
SETTINGS = {
    "layers1-3.5x": ["--times-smaller", "3.5", "--layers-per-block", "1"],
    "layers1-5x": ["--times-smaller", "5", "--layers-per-block", "1"],
    "layers5-5x": ["--times-smaller", "5", "--layers-per-block", "5"],
    "layers5-8x": ["--times-smaller", "8", "--layers-per-block", "5"],
    "autoencoder-2x": ["--codec", "autoencoder", "--latent-bits", "16", "--times-smaller", "2"],
}


def main(
    fit_text: Path,
    test_text: Path,
    only: Annotated[list[str] | None, typer.Option(help="Settings to run; all by default.")] = None,
    context: int = 4096,
    windows: int = 4,
) -> None:
    """Fit and evaluate each setting; a record for each goes into ``results/``."""
    RESULTS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in only or SETTINGS:
            bundle = str(Path(folder) / name)
            _run("fit-structure", "demo", "-o", bundle, *SETTINGS[name], "--text", str(fit_text), "--no-check")
            record = RESULTS / f"fidelity-{test_text.parent.name}-{test_text.stem}-{name}.json"
            _run(
                "eval", "demo", "--bundle", bundle, "--text", str(test_text), "--context", str(context),
                "--windows", str(windows), "--json", str(record),
            )  # fmt: skip


def _run(*arguments: str) -> None:
    print("kvcar", *arguments, flush=True)
    subprocess.run(["kvcar", *arguments], check=True)


if __name__ == "__main__":
    typer.run(main)
