"""``kvcar reproduce``, ``kvcar tasks`` and ``kvcar quantize``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ..bundle import Bundle, check_target
from ..errors import InputError
from ..paper.requantize import requantize
from ..models.load import load_model
from ..plan import Scales
from ..record import Record
from ..report.card import model_card
from .app import app
from .arguments import BundlePath, Device, Dtype, Json, Model, Text
from .console import check_writable, out, progress_bars, step_teller
from .texts import fit_and_check_text, up_to_windows

_EXAMPLES = """Run the paper's evaluation, or any other one that a YAML file describes.

Bundles, and the records of what was measured, are kept; a run that was stopped goes on where it was.

[bold]Examples[/]

  kvcar reproduce benchmarks/paper-demo.yaml

  kvcar reproduce benchmarks/paper-demo.yaml --only combined-48 --only combined-48-int8
"""


@app.command(help=_EXAMPLES)
def reproduce(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of settings.")],
    folder: Annotated[Path, typer.Option(metavar="FOLDER", help="For bundles and checkpoints.")] = Path("reproduction"),
    records: Annotated[Path, typer.Option(metavar="FOLDER", help="For records.")] = Path("benchmarks/results"),
    only: Annotated[list[str] | None, typer.Option(help="A setting to run, or 'system'; may be repeated.")] = None,
    tasks: Annotated[bool, typer.Option(help="Run the zero-shot tasks, which take longest.")] = True,
) -> None:
    """Run a reproduction; the examples in the help text say the rest."""
    from ..paper.config import read_config
    from ..paper.reproduce import Reproducer

    given = read_config(config)
    with progress_bars() as tell:
        Reproducer(given, folder / given.name, records, tell, step_teller()).run(only or (), tasks)
    out.print(f"records are in [bold]{records}[/]")


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
    from ..evaluate.tasks import KVCarLM, local_task, run_tasks

    loaded_bundle = None if bundle is None else Bundle.load(bundle)
    check_writable(json)
    given = [Path(name) if name.endswith(".jsonl") else name for name in names]
    for task in given:
        if isinstance(task, Path):
            local_task(task)  # a bad file is told before the model is loaded
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


@app.command()
def quantize(
    model: Model,
    bundle: BundlePath,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="BUNDLE", help="Folder to write; must not exist.")],
    bits: Annotated[int, typer.Option(min=1, max=8, help="Bits of every latent.")] = 8,
    scales: Annotated[
        str, typer.Option(help="static (a step per latent) or dynamic (per token, the paper's).")
    ] = "static",
    text: Text = None,
    tokens: Annotated[int, typer.Option(min=64, help="Tokens to fit static steps on.")] = 8192,
    force: Annotated[bool, typer.Option("--force", help="Replace a bundle that is already there.")] = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Store the latents of a finished bundle in fewer bits, its codecs unchanged.

    [bold]Examples[/]

      kvcar quantize demo --bundle trained -o trained-int8

      kvcar quantize demo --bundle trained -o trained-int8 --scales dynamic --force
    """
    if scales not in ("static", "dynamic"):
        raise InputError(f"scales must be static or dynamic, got {scales!r}")
    chosen: Scales = "static" if scales == "static" else "dynamic"
    first = Bundle.load(bundle)
    check_target(output, force)
    source, _ = fit_and_check_text(text, hold_back=False)
    with progress_bars() as tell:
        loaded = load_model(model, dtype, device, tell)
        context = min(512, first.plan.geometry.max_positions, tokens)
        windows = up_to_windows(loaded.tokenizer, source.text, context, max(1, tokens // context))
        result = requantize(first, loaded.model, windows, bits, chosen)
    result.save(output, model_card(result, None), overwrite=force)
    out.print(f"wrote [bold]{output}[/]")
