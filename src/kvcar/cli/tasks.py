"""``kvcar tasks``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import app
from .arguments import Device, Dtype, Json, Model

_TASK_EXAMPLES = """Zero-shot accuracy through the cache, by lm-evaluation-harness (pip install 'kvcar\\[tasks]').

[bold]Examples[/]

  kvcar tasks demo --bundle demo-5x piqa.jsonl winogrande.jsonl --limit 200

  kvcar tasks HuggingFaceTB/SmolLM2-360M --bundle bundle piqa winogrande

  kvcar tasks demo piqa.jsonl
"""


@app.command(help=_TASK_EXAMPLES)
def tasks(
    model: Model,
    names: Annotated[
        list[str], typer.Argument(metavar="TASK...", help="Names that the harness knows, or .jsonl files.")
    ],
    bundle: Annotated[
        Path | None, typer.Option("--bundle", "-b", metavar="BUNDLE", help="Default: the model's own full cache.")
    ] = None,
    window: Annotated[int, typer.Option(min=0, help="Recent tokens kept exact; task texts are short, so 0.")] = 0,
    step_tokens: Annotated[int, typer.Option(min=1, help="Tokens fed at once, which see each other exactly.")] = 1,
    limit: Annotated[int | None, typer.Option(min=1, help="Items of each task. Default: all.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts run together.")] = 32,
    json: Json = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Run tasks; the examples in the help text say the rest."""
    from rich.table import Table

    from ..bundle import Bundle
    from ..evaluate.tasks import KVCarLM, check_tasks, run_tasks
    from ..models.load import load_model
    from ..record import Record
    from .console import check_writable, out, progress_bars

    loaded_bundle = None if bundle is None else Bundle.from_pretrained(bundle)
    check_writable(json)
    given = [Path(name) if name.endswith(".jsonl") else name for name in names]
    check_tasks(given)  # before the model is loaded
    with progress_bars() as tell:
        loaded = load_model(model, dtype, device, tell)
    lm = KVCarLM(loaded.model, loaded.tokenizer, loaded_bundle, window, step_tokens, batch_size)
    try:
        results = run_tasks(lm, given, limit)
    finally:
        lm.close()
    table = Table(title=f"zero-shot, {'full cache' if bundle is None else bundle.name}", title_justify="left")
    for heading in ("task", "items", "accuracy", "standard error"):
        table.add_column(heading, justify="left" if heading == "task" else "right")
    for name, figures in results.items():
        row = (f"{100 * figures['acc']:.2f} %", f"{100 * figures['acc_stderr']:.2f}")
        table.add_row(name, str(figures["items"]), *row)
    out.print(table)
    if json is not None:
        config = {"model": model, "bundle": bundle.name if bundle else None, "window": window,
                  "step_tokens": step_tokens, "limit": limit, "dtype": str(loaded.model.dtype)}  # fmt: skip
        Record("tasks", {"tasks": results}, config).write(json)
