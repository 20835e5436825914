"""``kvcar compare``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ..bundle import Bundle
from ..errors import InputError
from ..evaluate.contenders import SIDE_BY_SIDE, Contender, bundle_contender, compare, groups, noise_floor
from ..evaluate.fidelity import Fidelity, fidelity_figures
from ..evaluate.quantized_caches import QUANTIZED, quantized_contenders
from ..text import TextSource, token_windows
from ..models.geometry import read_geometry
from ..models.load import load_model
from ..progress import counter
from ..record import Record, write_text
from ..report.plots import Point, frontier
from ..cache.attach import attach
from .app import app
from .arguments import Context, Device, Dtype, Json, Model, Text, Window, Windows
from .console import check_writable, errors, out, progress_bars
from .figures import fidelity_table
from .texts import evaluation_context, evaluation_text

_EXAMPLES = """Step MODEL through several caches over the same text, side by side, all bytes counted the same way.

Rows are the full cache, a lossless bundle (the noise floor), bundles, and transformers' quantised caches.

[bold]Examples[/]

  kvcar compare demo --bundle demo-5x

  kvcar compare demo --bundle 5x=demo-5x --bundle 8x=demo-8x --text test.txt --context 4096 --windows 4 --plot all.svg

  kvcar compare demo --bundle demo-5x --transformers quanto-4bit --json figures.json
"""


@app.command(name="compare", help=_EXAMPLES)
def compare_caches(
    model: Model,
    bundle: Annotated[
        list[str] | None,
        typer.Option("--bundle", "-b", metavar="[NAME=]BUNDLE", help="Folder that 'kvcar fit' wrote; repeatable."),
    ] = None,
    text: Text = None,
    context: Context = None,
    windows: Windows = 2,
    window: Window = None,
    transformers: Annotated[
        str, typer.Option(metavar="LIST", help=f"all, none, or some of: {', '.join(QUANTIZED)}.")
    ] = "all",
    side_by_side: Annotated[
        int, typer.Option(min=1, help="Caches stepped at once; fewer need less memory and more passes.")
    ] = SIDE_BY_SIDE,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Quality against size, as SVG.")] = None,
    json: Json = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Compare caches; the examples in the help text say the rest."""
    bundles = named_bundles(bundle or [])
    wanted = transformers_rows(transformers)
    for path in (plot, json):
        check_writable(path)
    source = evaluation_text(text)
    contenders = [bundle_contender(name, each, window) for name, each in bundles.items()]
    _tell_flattered(bundles, source)
    with progress_bars() as tell:
        loaded = load_model(model, dtype, device, tell)
        floor, lossless = noise_floor(loaded.model, model)
        geometry = read_geometry(loaded.model.config)
        quantized, missing = quantized_contenders(loaded.model.config, geometry, wanted)
        for name, reason in missing.items():
            errors.print(f"[yellow]left out:[/] {name}: {reason}", soft_wrap=True)
        contenders = [floor, *contenders, *quantized]
        ids = token_windows(loaded.tokenizer, source.text, evaluation_context(context, geometry.max_positions), windows)
        on_chunk = counter(tell, "compare", ids.numel() * len(groups(contenders, side_by_side)))
        with attach(loaded.model, lossless):
            results = list(compare(loaded.model, ids, contenders, on_chunk, side_by_side))
    out.print(fidelity_table({contender.name: result for contender, result in results}))
    if plot is not None:
        write_text(plot, comparison_plot(results))
    if json is not None:
        config = {"model": model, "text": source.name, "text_sha256": source.sha256, "dtype": str(loaded.model.dtype),
                  "left_out": missing}  # fmt: skip
        Record("comparison", {"rows": [_row(*each) for each in results]}, config).write(json)


def named_bundles(given: Sequence[str]) -> dict[str, Bundle]:
    """Bundles of ``NAME=PATH`` or ``PATH``, by name.

    Raises:
        InputError: two bundles of one name.
        BundleError: a folder that holds no bundle.
    """
    bundles: dict[str, Bundle] = {}
    for each in given:
        name, separator, path = each.partition("=")
        # A folder whose own name has a "=" in it is taken as it is.
        if not separator or Path(each).is_dir():
            name, path = Path(each).resolve().name, each
        if name in bundles or name in QUANTIZED:
            raise InputError(f"two rows would be called {name!r}; name bundles apart with --bundle NAME={path}")
        bundles[name] = Bundle.load(path)
    return bundles


def transformers_rows(chosen: str) -> list[str]:
    """Names of rows from ``all``, ``none`` or a list with commas; raises InputError."""
    if chosen in ("all", "none"):
        return list(QUANTIZED) if chosen == "all" else []
    names = [name.strip() for name in chosen.split(",")]
    for name in names:
        _ = QUANTIZED[name]  # an unknown one is told before the model is loaded
    return names


def comparison_plot(results: Sequence[tuple[Contender, Fidelity]]) -> str:
    """SVG of all rows, a line for each family; the noise floor is a line of its own."""
    series: dict[str, list[Point]] = {}
    floor = None
    for contender, f in results:
        if contender.family == "noise floor":
            floor = f.kl_divergence.value
            continue
        point = Point(contender.name, f.times_smaller, f.kl_divergence.value, f.kl_divergence.stderr)
        series.setdefault(contender.family, []).append(point)
    return frontier(series, floor)


def _tell_flattered(bundles: Mapping[str, Bundle], source: TextSource) -> None:
    for name, bundle in bundles.items():
        if bundle.fit.text_sha256 == source.sha256:
            errors.print(f"[yellow]note:[/] {name} was fitted on this very text, so the figures flatter it")


def _row(contender: Contender, result: Fidelity) -> dict[str, Any]:
    chosen = {"row": contender.name, "family": contender.family, "config": contender.config}
    return chosen | fidelity_figures(result)
