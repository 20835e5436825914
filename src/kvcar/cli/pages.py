"""``kvcar pages``."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from ..bundle import Bundle
from ..evaluate.page_budget import BUDGET_TOKENS, PageBudget, measure_page_budget
from ..fit.text import token_windows
from ..models.load import load_model
from ..record import Record
from ..runtime.attach import attach
from ..runtime.cache import KVCarCache
from .app import app
from .arguments import BundlePath, Context, Device, Dtype, Json, Model, Text, Window
from .console import check_writable, out, progress_bars
from .texts import evaluation_context, evaluation_text

_EXAMPLES = """Share out the pages that decode steps attend to among the layers, by what it costs to take pages from each.

Prints the numbers that --attend-pages takes. Use text that is not evaluated on, and a context as long as in use.

[bold]Examples[/]

  kvcar pages demo --bundle demo-5x --text my.txt --context 8000 --average 20

  kvcar generate demo --bundle demo-5x --prompt-file book.txt --attend-pages 10,10,10,18,18,18,...
"""


@app.command(help=_EXAMPLES)
def pages(
    model: Model,
    bundle: BundlePath,
    average: Annotated[int, typer.Option(min=2, help="Pages of a layer, on average.")],
    text: Text = None,
    context: Context = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows, spread evenly over the text.")] = 1,
    following: Annotated[int, typer.Option(min=1, help="Tokens at the end of a window to step.")] = BUDGET_TOKENS,
    window: Window = None,
    json: Json = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Share out pages; the examples in the help text say the rest."""
    loaded_bundle = Bundle.load(bundle)
    check_writable(json)
    source = evaluation_text(text)
    KVCarCache(loaded_bundle, window)  # a bad window is told before the model is loaded
    context = evaluation_context(context, loaded_bundle.plan.geometry.max_positions)
    with progress_bars() as tell:
        loaded = load_model(model, dtype, device, tell)
        ids = token_windows(loaded.tokenizer, source.text, context, windows)
        with attach(loaded.model, loaded_bundle, window):
            found = measure_page_budget(
                loaded.model, loaded_bundle, ids, average, following, window=window, on_progress=tell
            )
    out.print(_table(found, average))
    out.print("--attend-pages " + ",".join(map(str, found.pages)), soft_wrap=True)
    if json is not None:
        figures = {
            "pages": found.pages, "held_pages": found.held_pages, "groups": found.groups,
            "kl_divergences": [cost.value for cost in found.costs],
            "kl_divergence_stderrs": [cost.stderr for cost in found.costs],
        }  # fmt: skip
        config = {
            "model": model, "bundle": bundle.name, "bundle_sha256": loaded_bundle.digest, "text": source.name,
            "text_sha256": source.sha256, "context": context, "windows": windows, "following": following, "average": average,
        }  # fmt: skip
        Record("page-budget", figures, config).write(json)


def _table(found: PageBudget, average: int) -> Table:
    table = Table(title=f"{average} of {found.held_pages} pages a layer, shared out", title_justify="left")
    for heading in ("layers", "KL divergence with no more than the average", "pages each"):
        table.add_column(heading, justify="right")
    for group, cost in zip(found.groups, found.costs, strict=True):
        counts = sorted({found.pages[layer] for layer in group})
        table.add_row(
            "-".join(map(str, sorted({min(group), max(group)}))),
            f"{cost.value:.5f} ± {cost.stderr:.5f}",
            " or ".join(map(str, counts)),
        )
    return table
