"""The frontier of quality against bytes: bundles by profile at several sizes, on several texts, stepped through the cache.

python benchmarks/frontier.py fit FOLDER wikitext-2/valid.txt 'c4/validation-1k.jsonl[:500]'
python benchmarks/frontier.py evaluate FOLDER wikitext-2/test.txt
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from kvcar.bundle import Bundle
from kvcar.cache.attach import attach
from kvcar.cache.cache import KVCarCache
from kvcar.evaluate.fidelity import fidelity_figures, measure_fidelity
from kvcar.fit.fit import fit_bundles
from kvcar.fit.options import PROFILES, FitOptions
from kvcar.fit.windows import text_windows
from kvcar.models.load import LoadedModel, load_model
from kvcar.record import Record
from kvcar.text import read_text, token_windows

RESULTS = Path(__file__).parent / "results"
SETTINGS = {
    "fast-4x": ("fast", 4.0),
    "balanced-8x": ("balanced", 8.0),
    "small-8x": ("small", 8.0),
    "small-12x": ("small", 12.0),
    "stored-24x": ("stored", 24.0),
}
app = typer.Typer()

Only = Annotated[list[str] | None, typer.Option(help="Settings to run; all by default.")]


def _tell(what: str, done: int, total: int) -> None:
    if done >= total or done == 0:
        print(f"{time.strftime('%H:%M:%S')} {what}: {done} of {total}", flush=True)


@app.command()
def fit(
    folder: Path,
    texts: list[Path],
    only: Only = None,
    model: str = "demo",
    tokens: int | None = None,
) -> None:
    """Fit the bundles from shared statistics, those for stored contexts from their own; a record of each goes into ``results/``.

    As ``kvcar fit`` does, half of what they are fitted on the model writes itself. Without ``tokens`` each profile takes as many as
    it does by default.
    """
    loaded = load_model(model, "float32")
    chosen = [name for name in SETTINGS if not only or name in only]
    for stored in (False, True):
        names = [name for name in chosen if PROFILES[SETTINGS[name][0]].entropy_coded == stored]
        if names:
            _fit_together(folder, loaded, texts, names, model, tokens)


def _fit_together(
    folder: Path,
    loaded: LoadedModel,
    texts: list[Path],
    names: list[str],
    model: str,
    tokens: int | None,
) -> None:
    options = [FitOptions(profile=SETTINGS[name][0], times_smaller=SETTINGS[name][1]) for name in names]
    read = text_windows(loaded.model, loaded.tokenizer, texts, tokens, options[0], check=False, on_progress=_tell)
    bundles = fit_bundles(loaded.model, read.windows, options, read.source, model, _tell)
    for name, option in zip(names, options, strict=True):
        began = time.perf_counter()
        bundle = next(bundles)
        seconds = time.perf_counter() - began
        bundle.save_pretrained(folder / name, overwrite=True)
        figures = {
            "two_pass_kl": bundle.figures["two_pass_kl"],
            "curve": bundle.figures["curve"],
            "seconds": seconds,
            "codec_bytes": bundle.codec_bytes,
            "blocks": [[b.kind, sorted({s.layer for s in b.slots})] for b in bundle.plan.blocks],
        }
        Record("frontier-fit", figures, {"model": model, "name": name, **option.as_dict()}).write(
            RESULTS / f"frontier-fit-{name}.json"
        )
        print(f"{name}: two-pass KL {figures['two_pass_kl']:.5f}, {seconds:.0f} s", flush=True)


@app.command()
def evaluate(
    folder: Path,
    text: Path,
    only: Only = None,
    model: str = "demo",
    context: int = 4096,
    windows: int = 4,
    name: str = "",
) -> None:
    """Evaluate the bundles on a text, side by side; a record of each goes into ``results/``."""
    source, loaded = read_text(text), load_model(model, "float32")
    ids = token_windows(loaded.tokenizer, source.text, context, windows)
    bundles = {
        n: Bundle.from_pretrained(folder / n) for n in SETTINGS if (not only or n in only) and (folder / n).exists()
    }
    # A stored context keeps no window: all of it but the sinks is read from codes.
    caches = {
        n: (lambda b=bundle, w=(0 if SETTINGS[n][0] == "stored" else None): KVCarCache(b, w))
        for n, bundle in bundles.items()
    }
    done = 0

    def on_chunk(tokens: int) -> None:
        nonlocal done
        done += tokens
        if done % 1024 == 0:
            _tell(f"evaluated {done}", done, done)

    with attach(loaded.model, next(iter(bundles.values()))):
        results = measure_fidelity(loaded.model, ids, caches, on_chunk)
    label = name or text.parent.name
    for n, bundle in bundles.items():
        config = {
            "model": model, "name": n, "profile": SETTINGS[n][0], "target": SETTINGS[n][1], "text": source.name,
            "text_name": label, "text_sha256": source.sha256, "dtype": str(loaded.model.dtype),
            "window": 0 if SETTINGS[n][0] == "stored" else bundle.plan.window, "fit": bundle.fit.model_dump(mode="json"),
        }  # fmt: skip
        figures = fidelity_figures(results[n])
        Record("frontier", figures, config).write(RESULTS / f"frontier-{label}-{n}.json")
        kl = figures["kl_divergence"]
        print(f"{n}: {figures['times_smaller']:.2f}x KL {kl:.5f} ppl x {figures['perplexity_ratio']:.4f}", flush=True)


if __name__ == "__main__":
    app()
