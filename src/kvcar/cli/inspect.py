"""``kvcar inspect``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InputError
from .app import app
from .arguments import Json
from .console import check_writable, out

if TYPE_CHECKING:
    from ..bundle import Bundle
    from ..bundle.summary import LayerBits

_BAR = 32
_EXAMPLES = """Show what a bundle stores: its plan as a table and its bits by layer.

[bold]Examples[/]

  kvcar inspect demo-5x

  kvcar inspect demo-5x --plot bits.svg --json plan.json
"""


@app.command(help=_EXAMPLES)
def inspect(
    bundle: Annotated[
        str, typer.Argument(metavar="BUNDLE", help="Folder that 'kvcar fit' wrote, or a hub id (id@revision).")
    ],
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the bits by layer as an SVG picture.")
    ] = None,
    json: Json = None,
) -> None:
    """Show a bundle; the examples in the help text say the rest."""
    from ..bundle import Bundle, bits_by_layer, summarise_blocks
    from ..record import Record, write_text
    from ..report.plots import bits_per_layer
    from ..sizes import codec_figures

    if plot is not None and plot.suffix != ".svg":
        raise InputError(f"--plot writes SVG; name the file something.svg, not {plot.name}")
    check_writable(plot)
    check_writable(json)
    loaded = Bundle.from_pretrained(bundle)
    layers = bits_by_layer(loaded.plan)
    _print_head(loaded)
    _print_plan(loaded)
    _print_bits(layers)
    if plot is not None:
        write_text(plot, bits_per_layer(layers, f"{loaded.model.name}: {Path(bundle).name}"))
    if json is not None:
        figures = {
            "blocks": [asdict(block) for block in summarise_blocks(loaded.plan)],
            "bits_by_layer": [asdict(layer) for layer in layers],
            **codec_figures(loaded.plan, loaded.codec_bytes),
        }
        Record("plan", figures, {"bundle": Path(bundle).name}).write(json)


def _print_head(bundle: Bundle) -> None:
    from ..bundle import windows_in_words
    from ..sizes import REFERENCE_TOKENS, codecs_in_words, size_in_words, stored_bytes

    plan, fit = bundle.plan, bundle.fit
    tokens = min(REFERENCE_TOKENS, plan.geometry.max_positions)
    out.print(
        f"[bold]{bundle.model.name}[/] ({bundle.model.architecture}, weights {bundle.model.fingerprint[:12]}, {bundle.model.dtype})"
    )
    out.print(
        f"fitted {fit.date} on {fit.tokens:,} tokens of {fit.text} with kvcar {fit.kvcar_version}", highlight=False
    )
    out.print(
        f"at {tokens:,} tokens {size_in_words(plan, tokens, stored_bytes(plan, tokens, 2))}; sinks {plan.sinks}, window {plan.window}, "
        f"pages of {plan.page_tokens} tokens; {codecs_in_words(plan, bundle.codec_bytes)}",
        highlight=False,
    )
    if (limit := plan.cache.page_cost_limit) is not None:
        out.print(f"pages that would cost more than {limit:.4f} nats a token are kept exactly", highlight=False)
    for line in windows_in_words(plan.geometry):
        out.print(line, highlight=False)


def _print_plan(bundle: Bundle) -> None:
    from rich.table import Table

    from ..bundle import summarise_blocks

    table = Table(title="plan", title_justify="left")
    for heading in ("block", "codec", "kind", "layers", "heads", "width", "latents", "bits/element", "latents x bits"):
        table.add_column(heading, justify="left" if heading in ("codec", "kind", "latents x bits") else "right")
    for row in summarise_blocks(bundle.plan):
        table.add_row(
            str(row.index), row.codec, row.kind, row.layers, row.heads, str(row.width), str(row.latents),
            f"{row.bits_per_element:.2f}", row.widths,
        )  # fmt: skip
    out.print(table)
    for reuse in bundle.plan.reuses:
        out.print(f"slot {reuse.slot} reuses {reuse.source}")


def _print_bits(layers: list[LayerBits]) -> None:
    highest = max(max(layer.key, layer.value) for layer in layers)
    out.print("bits per element by layer (keys, values)")
    for layer in layers:
        for label, bits, colour in ((f"{layer.layer:>4} K", layer.key, "blue"), ("     V", layer.value, "yellow")):
            bar = "█" * max(1, round(_BAR * bits / highest)) if bits else ""
            out.print(f"{label} [{colour}]{bar}[/] {bits:.2f}", highlight=False)
