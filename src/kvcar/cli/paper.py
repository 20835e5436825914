"""``kvcar paper``: KV-CAR as published. Here: ``similarity``, ``quantize`` and ``reproduce``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .app import app
from .arguments import BundlePath, Device, Dtype, Json, Model, Text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from ..paper.algorithm2 import Candidate

paper = typer.Typer(
    help="KV-CAR (arXiv 2512.06727) as published: shared heads, trained autoencoders, int8 latents, its evaluation.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)
app.add_typer(paper, name="paper")

_CONTEXT = 512

_SIMILARITY = """Compare the heads of adjacent layers, and choose which ones to store only once (the paper's Algorithm 2).

[bold]Examples[/]

  kvcar paper similarity demo --plot heads.svg

  kvcar paper similarity demo --measure l1 --count 20 -o shared

  kvcar paper similarity demo --measure kl --threshold 0.002 -o shared
"""


@paper.command(help=_SIMILARITY)
def similarity(
    model: Model,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="BUNDLE", help="Write a bundle that shares the chosen slots."),
    ] = None,
    text: Text = None,
    tokens: Annotated[int, typer.Option(min=16, help="Tokens to compare on, or fewer if the text has fewer.")] = 8192,
    measure: Annotated[
        str, typer.Option(help="l1 (the paper's), or kl: the divergence that sharing a slot causes (slower, better).")
    ] = "l1",
    any_head: Annotated[
        bool, typer.Option("--any-head", help="Consider every head of the layer below, not just the same number.")
    ] = False,
    count: Annotated[int | None, typer.Option(min=0, help="Share this many slots.")] = None,
    threshold: Annotated[float | None, typer.Option(help="Share slots whose cost is below this.")] = None,
    window: Annotated[int, typer.Option(min=0, help="Recent tokens kept exact, a multiple of 64.")] = 64,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Heat map as SVG.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a bundle that is already there.")] = False,
    json: Json = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Compare heads; the examples in the help text say the rest."""
    from ..bundle import check_target
    from ..errors import InputError
    from ..models.load import load_model
    from ..paper.algorithm2 import MEASURES, choose_reuses, find_candidates, shared_bundle
    from ..record import Record, write_text
    from ..report.plots import reuse_costs
    from ..text import fit_and_check_text, up_to_windows
    from .console import check_writable, out, progress_bars

    if measure not in MEASURES:
        raise InputError(f"unknown measure {measure!r}; known are: {', '.join(MEASURES)}")
    choosing = count is not None or threshold is not None
    if count is not None and threshold is not None:
        raise InputError("choose reuses by a count or by a threshold, one of them")
    if output is not None:
        if not choosing:
            raise InputError("to write a bundle, say how many slots to share: --count or --threshold")
        check_target(output, force)
    for path in (plot, json):
        check_writable(path)
    source, _ = fit_and_check_text(text, hold_out=False)
    with progress_bars() as on_progress:
        loaded = load_model(model, dtype, device, on_progress)
        context = min(_CONTEXT, loaded.model.config.get_text_config().max_position_embeddings, tokens)
        windows = up_to_windows(loaded.tokenizer, source.text, context, max(1, tokens // context))
        candidates = find_candidates(loaded.model, windows, measure, any_head, on_progress=on_progress)
    out.print(_cost_table(candidates, measure))
    chosen = choose_reuses(candidates, count, threshold) if choosing else ()
    if choosing:
        listed = ", ".join(f"{r.slot} <- {r.source}" for r in chosen)
        out.print(f"{len(chosen)} of {len(candidates)} slots chosen: {listed}")
    if plot is not None:
        write_text(plot, reuse_costs({c.slot: c.cost for c in candidates}, measure))
    if output is not None:
        bundle = shared_bundle(loaded.model, model, windows, source, chosen, window)
        bundle.save_pretrained(output, overwrite=force)
        out.print(f"wrote [bold]{output}[/]")
    if json is not None:
        figures = {
            "candidates": [[list(c.slot), list(c.source), c.cost] for c in candidates],
            "chosen": [[list(r.slot), list(r.source)] for r in chosen],
        }
        config = {"model": model, "text": source.name, "text_sha256": source.sha256, "tokens": windows.numel(),
                  "measure": measure, "any_head": any_head, "count": count, "threshold": threshold}  # fmt: skip
        Record("similarity", figures, config).write(json)


def _cost_table(candidates: Sequence[Candidate], measure: str) -> Table:
    """A row for each layer, a column for each head of keys and values."""
    from rich.table import Table

    from ..geometry import KINDS

    table = Table(title=f"heads against the layer below, by {measure}", title_justify="left")
    table.add_column("layer")
    for kind in KINDS:
        for head in sorted({c.slot.head for c in candidates}):
            table.add_column(f"{kind} {head}", justify="right")
    cost = {c.slot: c.cost for c in candidates}
    for layer in dict.fromkeys(c.slot.layer for c in candidates):
        own = sorted((s for s in cost if s.layer == layer), key=lambda s: (KINDS.index(s.kind), s.head))
        table.add_row(str(layer), *(f"{cost[slot]:.4f}" for slot in own))
    return table


@paper.command()
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
    """Store the latents of a finished bundle in fewer bits, its codecs unchanged (the paper's int8).

    [bold]Examples[/]

      kvcar paper quantize demo --bundle trained -o trained-int8

      kvcar paper quantize demo --bundle trained -o trained-int8 --scales dynamic --force
    """
    from ..bundle import Bundle, check_target
    from ..errors import InputError
    from ..models.load import load_model
    from ..paper.quantize import quantize_latents
    from ..text import fit_and_check_text, up_to_windows
    from .console import out, progress_bars

    if scales not in ("static", "dynamic"):
        raise InputError(f"scales must be static or dynamic, got {scales!r}")
    first = Bundle.from_pretrained(bundle)
    check_target(output, force)
    source, _ = fit_and_check_text(text, hold_out=False)
    with progress_bars() as on_progress:
        loaded = load_model(model, dtype, device, on_progress)
        context = min(_CONTEXT, first.plan.geometry.max_positions, tokens)
        windows = up_to_windows(loaded.tokenizer, source.text, context, max(1, tokens // context))
        result = quantize_latents(first, loaded.model, windows, bits, "static" if scales == "static" else "dynamic")
    result.save_pretrained(output, overwrite=force)
    out.print(f"wrote [bold]{output}[/]")


_REPRODUCE = """Run the paper's evaluation, or any other one that a YAML file describes.

Bundles, and the records of what was measured, are kept; a run that was stopped goes on where it was.

[bold]Examples[/]

  kvcar paper reproduce benchmarks/paper-demo.yaml

  kvcar paper reproduce benchmarks/paper-demo.yaml --only reuse-05 --only linear-48
"""


@paper.command(help=_REPRODUCE)
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
    from .console import out, progress_bars, step_teller

    given = read_config(config)
    with progress_bars() as on_progress:
        Reproducer(given, folder / given.name, records, on_progress, step_teller()).run(only or (), tasks)
    out.print(f"records are in [bold]{records}[/]")
