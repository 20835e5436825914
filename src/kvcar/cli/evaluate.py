"""``kvcar eval``."""

from __future__ import annotations

from typing import Annotated

import typer

from ..bundle import Bundle
from ..evaluate.fidelity import Fidelity, fidelity_figures, measure_fidelity
from ..text import token_windows
from ..models.load import load_model
from ..progress import counter
from ..record import Record
from ..cache.attach import attach
from ..cache.cache import KVCarCache
from .app import app
from .arguments import BundlePath, Context, Device, Dtype, Json, Model, Text, Window, Windows
from .console import check_writable, errors, out, progress_bars
from .figures import fidelity_table
from .texts import evaluation_context, evaluation_text

_EXAMPLES = """Measure a bundle against MODEL's own full cache, stepped through both.

[bold]Examples[/]

  kvcar eval demo --bundle demo-5x

  kvcar eval demo --bundle demo-5x --text test.txt --context 4096 --windows 4 --json figures.json

  kvcar eval demo --bundle demo-5x --window 0

  kvcar eval demo --bundle demo-5x --attend-pages 16 --context 8000 --windows 1     # token by token, at the end
"""


@app.command(name="eval", help=_EXAMPLES)
def evaluate(
    model: Model,
    bundle: BundlePath,
    text: Text = None,
    context: Context = None,
    windows: Windows = 2,
    window: Window = None,
    json: Json = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Evaluate a bundle; the examples in the help text say the rest."""
    loaded_bundle = Bundle.load(bundle)
    check_writable(json)
    source = evaluation_text(text)
    context = evaluation_context(context, loaded_bundle.plan.geometry.max_positions)
    KVCarCache(loaded_bundle, window)  # what is wrong with these is told before the model is loaded
    fitted_on_this = source.sha256 == loaded_bundle.fit.text_sha256
    if fitted_on_this:
        errors.print("[yellow]note:[/] the bundle was fitted on this very text, so the figures flatter it")
    with progress_bars() as tell:
        loaded = load_model(model, dtype, device, tell)
        ids = token_windows(loaded.tokenizer, source.text, context, windows)
        config = {
            "model": model, "bundle": bundle.name, "text": source.name, "text_sha256": source.sha256, "dtype": str(loaded.model.dtype),
            "window": loaded_bundle.plan.window if window is None else window, "fitted_on_this_text": fitted_on_this,
            "fit": loaded_bundle.fit.model_dump(mode="json"),
        }  # fmt: skip
        with attach(loaded.model, loaded_bundle, window):
            on_chunk = counter(tell, "evaluate", ids.numel())
            caches = {bundle.name: lambda: KVCarCache(loaded_bundle, window, keep_decoded=True)}
            result = measure_fidelity(loaded.model, ids, caches, on_chunk)[bundle.name]
            out.print(fidelity_table({bundle.name or str(bundle): result}))
            _tell_worst(result)
            record = Record("fidelity", fidelity_figures(result), config)
    if json is not None:
        record.write(json)


def _tell_worst(result: Fidelity) -> None:
    by_window = sorted(enumerate(result.window_kl_divergences), key=lambda pair: -pair[1])[:3]
    worst = ", ".join(f"#{index} {value:.5f}" for index, value in by_window)
    out.print(
        f"worst windows by KL divergence: {worst}; worst hundredth of tokens: above {result.kl_divergence_worst_1_percent:.4f}"
    )
