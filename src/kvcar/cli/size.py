"""``kvcar size``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InputError, ModelMismatchError
from .app import app
from .arguments import Json, Model
from .console import check_writable, out, progress_bars

if TYPE_CHECKING:
    from rich.table import Table

    from ..sizes import Fits, SizeOf

_EXAMPLES = """Say how much fits into memory with MODEL's own cache and with a compressed one. Reads no weights.

[bold]Examples[/]

  kvcar size demo --bundle demo-5x

  kvcar size meta-llama/Llama-3.1-8B --memory 40GiB --batch 16 --tokens 8192
"""


@app.command(help=_EXAMPLES)
def size(
    model: Model,
    bundle: Annotated[
        str | None,
        typer.Option(
            "--bundle", "-b", metavar="BUNDLE", help="Folder that 'kvcar fit' wrote, or a hub id (id@revision)."
        ),
    ] = None,
    memory: Annotated[str, typer.Option(help="Memory for cache and codecs, weights left out.")] = "24GiB",
    batch: Annotated[int, typer.Option(min=1, help="Sequences, for the longest length.")] = 1,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a sequence, for the largest batch.")] = 4096,
    json: Json = None,
) -> None:
    """Compute sizes; the examples in the help text say the rest."""
    from ..bundle import Bundle
    from ..models.geometry import read_geometry
    from ..models.load import load_config
    from ..record import Record
    from ..sizes import codec_figures, codecs_in_words, compressed_size, full_size, parse_bytes, what_fits

    budget = parse_bytes(memory)
    check_writable(json)
    loaded = Bundle.from_pretrained(bundle) if bundle is not None else None
    with progress_bars() as tell:
        geometry = read_geometry(load_config(model, tell))
    if tokens > geometry.max_positions:
        raise InputError(f"{tokens} tokens are more than the model's {geometry.max_positions} positions")
    sizes: dict[str, SizeOf] = {"full (bfloat16)": full_size(geometry)}
    if loaded is not None:
        if loaded.plan.geometry != geometry:
            raise ModelMismatchError(
                f"this bundle was fitted for {loaded.model.name}, whose cache has another shape than {model}'s"
            )
        sizes[bundle or ""] = compressed_size(loaded.plan, model_bytes=2)
    # Codecs are loaded once, and leave the rest to the cache.
    budgets = [budget] if loaded is None else [budget, budget - loaded.codec_bytes]
    fits = {
        name: what_fits(of, max(0, left), batch, tokens, geometry.max_positions)
        for (name, of), left in zip(sizes.items(), budgets, strict=True)
    }
    out.print(_table(sizes, fits, memory, batch, tokens))
    if loaded is not None:
        out.print(codecs_in_words(loaded.plan, loaded.codec_bytes) + "; what fits is beside them", highlight=False)
    if json is not None:
        figures: dict[str, object] = {
            name: {
                "bytes": of(tokens, batch), "bytes_per_token": of(tokens, 1) / tokens,
                "longest_tokens": fit.longest_tokens, "largest_batch": fit.largest_batch,
            }
            for name, of, fit in zip(("full", "compressed"), sizes.values(), fits.values(), strict=False)
        }  # fmt: skip
        if loaded is not None:
            figures |= codec_figures(loaded.plan, loaded.codec_bytes)
        config = {"model": model, "memory_bytes": budget, "batch": batch, "tokens": tokens}
        Record("size", figures, config).write(json)


def _table(sizes: dict[str, SizeOf], fits: dict[str, Fits], memory: str, batch: int, tokens: int) -> Table:
    from rich.table import Table

    table = Table(title=f"in {memory}, weights left out", title_justify="left")
    table.add_column("cache")
    for heading in (
        f"bytes/token at {tokens:,}",
        f"bytes of batch {batch} x {tokens:,}",
        f"longest at batch {batch}",
        f"largest batch at {tokens:,}",
    ):
        table.add_column(heading, justify="right")
    for name, of in sizes.items():
        fit = fits[name]
        longest = f"{fit.longest_tokens:,}" + (" (all positions)" if fit.cut_by_positions else "")
        table.add_row(
            name, f"{of(tokens, 1) / tokens:,.0f}", f"{of(tokens, batch):,}", longest, f"{fit.largest_batch:,}"
        )
    return table
