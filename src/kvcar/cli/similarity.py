"""``kvcar similarity``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from torch import Tensor

from ..bundle import check_target
from ..errors import InputError
from ..sizes import compressed_size
from ..fit.fit import fit_bundle
from ..fit.options import FitOptions
from ..paper.similarity import Similarity, measure_similarity
from ..models.load import load_model
from ..paper.reuse import MEASURES, Candidate, choose_reuses
from ..record import Record, write_text
from ..report.card import model_card
from ..report.plots import head_distances
from ..geometry import KINDS
from ..paper.harm import measure_harm
from .app import app
from .arguments import Device, Dtype, Json, Model, Text
from .console import check_writable, out, progress_bars
from .fit import bundle_element_bytes
from .texts import fit_and_check_text, up_to_windows

_CONTEXT, _TOKENS, _HARM_CONTEXT, _HARM_WINDOWS = 512, 8192, 256, 2
_KL = "kl"
_EXAMPLES = """Compare the heads of adjacent layers, and choose which ones to store only once (the paper's Algorithm 2).

[bold]Examples[/]

  kvcar similarity demo --plot heads.svg

  kvcar similarity demo --measure l1 --count 20 -o shared

  kvcar similarity demo --measure kl --threshold 0.002 -o shared

  kvcar fit demo --reuse shared --codec autoencoder --key-latents 96 --value-latents 96 -o both
"""


@app.command(help=_EXAMPLES)
def similarity(
    model: Model,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="BUNDLE", help="Write a bundle that shares the chosen slots."),
    ] = None,
    text: Text = None,
    tokens: Annotated[
        int, typer.Option(min=16, help="Tokens to compare on, or fewer if the text has fewer.")
    ] = _TOKENS,
    measure: Annotated[
        str, typer.Option(help=f"{', '.join(MEASURES)}, or kl: the divergence that sharing a slot causes (slower).")
    ] = "l1",
    any_head: Annotated[
        bool, typer.Option("--any-head", help="Consider every head of the layer below, not just the same number.")
    ] = False,
    count: Annotated[int | None, typer.Option(min=0, help="Share this many slots.")] = None,
    threshold: Annotated[float | None, typer.Option(help="Share slots whose distance is below this.")] = None,
    dissimilar: Annotated[
        bool, typer.Option("--dissimilar", help="Share the least alike instead (KVSharer's finding).")
    ] = False,
    window: Annotated[int, typer.Option(min=0, help="Recent tokens kept exact, a multiple of 64.")] = 64,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Heat map as SVG.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a bundle that is already there.")] = False,
    json: Json = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Compare heads; the examples in the help text say the rest."""
    if measure not in (*MEASURES, _KL):
        raise InputError(f"unknown measure {measure!r}; known are: {', '.join((*MEASURES, _KL))}")
    choosing = count is not None or threshold is not None
    if choosing:
        choose_reuses([], 0 if count is not None else None, threshold)  # both given is told before any work
    if output is not None:
        if not choosing:
            raise InputError("to write a bundle, say how many slots to share: --count or --threshold")
        check_target(output, force)
    for path in (plot, json):
        check_writable(path)
    source, _ = fit_and_check_text(text, hold_back=False)
    with progress_bars() as tell:
        loaded = load_model(model, dtype, device, tell)
        context = min(_CONTEXT, loaded.model.config.get_text_config().max_position_embeddings, tokens)
        windows = up_to_windows(loaded.tokenizer, source.text, context, max(1, tokens // context))
        found = measure_similarity(loaded.model, windows, on_progress=tell)
        nearest = "relative_l1" if measure == _KL else measure
        candidates = found.candidates(nearest, any_head)
        if measure == _KL:
            candidates = measure_harm(loaded.model, _short(windows), candidates, on_progress=tell)
        chosen = choose_reuses(candidates, count, threshold, dissimilar) if choosing else ()
        bundle = None
        if output is not None:
            options = FitOptions(codec="linear", layers=(), reuses=chosen, window=window)
            bundle = fit_bundle(loaded.model, model, windows, source, options, tell)
    out.print(_table(found, candidates, measure))
    if choosing:
        out.print(
            f"{len(chosen)} of {len(candidates)} slots chosen: " + ", ".join(f"{r.slot} <- {r.source}" for r in chosen)
        )
    if plot is not None:
        write_text(plot, head_distances(candidates, measure))
    if output is not None and bundle is not None:
        bundle.save(output, model_card(bundle, None), overwrite=force)
        length = min(4096, bundle.plan.geometry.max_positions)
        stored = compressed_size(bundle.plan, bundle_element_bytes(bundle))(length, 1)
        smaller = bundle.plan.geometry.full_bytes(length) / stored
        out.print(f"wrote [bold]{output}[/]: {smaller:.2f} times smaller at {length:,} tokens, all bytes counted")
    if json is not None:
        figures = _figures(found, candidates) | {"chosen": [[list(r.slot), list(r.source)] for r in chosen]}
        config = {"model": model, "text": source.name, "text_sha256": source.sha256, "measure": measure,
                  "any_head": any_head, "count": count, "threshold": threshold, "dissimilar": dissimilar}  # fmt: skip
        Record("similarity", figures, config).write(json)


def _short(windows: Tensor) -> Tensor:
    """A few short windows: sharing is tried out once for every slot."""
    return windows[:_HARM_WINDOWS, :_HARM_CONTEXT]


def _table(found: Similarity, candidates: list[Candidate], measure: str) -> Table:
    table = Table(title=f"heads against the layer below, by {measure} ({found.tokens:,} tokens)", title_justify="left")
    table.add_column("layer")
    heads = range(found.geometry.kv_heads)
    for kind in KINDS:
        for head in heads:
            table.add_column(f"{kind} {head}", justify="right")
    cost = {c.slot: c.cost for c in candidates}
    for layer in dict.fromkeys(c.slot.layer for c in candidates):
        row = [cost[slot] for slot in sorted(cost, key=lambda s: (KINDS.index(s.kind), s.head)) if slot.layer == layer]
        table.add_row(str(layer), *(f"{value:.4f}" for value in row))
    return table


def _figures(found: Similarity, candidates: list[Candidate]) -> dict[str, Any]:
    matrices = {
        measure: {f"{layer}.{kind}": matrix.tolist() for (layer, kind), matrix in by_pair.items()}
        for measure, by_pair in found.distances.items()
    }
    costs = [[list(c.slot), list(c.source), c.cost] for c in candidates]
    return {"tokens": found.tokens, "distances": matrices, "candidates": costs}
