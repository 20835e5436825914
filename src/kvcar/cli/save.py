"""``kvcar save``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InputError
from .app import app
from .arguments import BundlePath, Device, Dtype, Json, Model, Window
from .console import check_writable, errors, progress_bars

if TYPE_CHECKING:
    from torch import Tensor

    from ..models.load import LoadedModel

_EXAMPLES = """Let MODEL read a text once, and keep its compressed cache in a file. 'kvcar generate --context' goes on from that file, and
does not read the text again.

It fits this model and this bundle only, and holds the tokens of the text unless --no-token-ids is given.

[bold]Examples[/]

  kvcar save demo --bundle demo-5x --text manual.txt -o manual.ctx

  kvcar generate demo --bundle demo-5x --context manual.ctx --prompt "In short, the manual says"
"""


@app.command(help=_EXAMPLES)
def save(
    model: Model,
    bundle: BundlePath,
    text: Annotated[Path, typer.Option(metavar="FILE", help="A .txt file, or a .jsonl file with a field 'text'.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Where to store the context.")],
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Store only the first tokens of the text. Default: all.")
    ] = None,
    prefill_chunk: Annotated[
        int, typer.Option(min=1, help="Tokens computed at once. They see each other exactly; more take more memory.")
    ] = 512,
    keep_window: Annotated[
        bool, typer.Option("--keep-window", help="Store the most recent tokens exactly, which takes more bytes.")
    ] = False,
    token_ids: Annotated[
        bool, typer.Option(help="Store the tokens of the text too, to check or compute it again.")
    ] = True,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    window: Window = None,
    json: Json = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Store a context; the help text says the rest."""
    from ..bundle import Bundle
    from ..cache.attach import attach, prefill
    from ..context import check_store, save_context
    from ..models.load import load_model
    from ..record import Record
    from ..text import read_text

    # What is wrong with these is said before the model is loaded.
    check_store()
    source, loaded_bundle = read_text(text), Bundle.from_pretrained(bundle)
    if output.exists() and not force:
        raise InputError(f"{output} exists; choose another name, or replace it with --force")
    check_writable(output)
    check_writable(json)
    plan = loaded_bundle.plan
    plan.cache.with_window(window)
    with progress_bars() as tell:
        loaded = load_model(model, dtype, device, tell)
        ids = _encode(loaded, source.text, tokens, plan.geometry.max_positions)
        with attach(loaded.model, loaded_bundle, window) as attachment:
            cache = attachment.new_cache()
            began = time.perf_counter()
            prefill(loaded.model, cache, ids, prefill_chunk, tell)
            prefilled = time.perf_counter()
            save_context(cache, output, keep_window, ids if token_ids else None)
            saved = time.perf_counter()
    stored, full = output.stat().st_size, plan.geometry.full_bytes(ids.shape[1])
    size = f"{full / stored:.2f} times smaller" if stored <= full else f"{stored / full:.2f} times larger"
    errors.print(
        f"{ids.shape[1]} tokens read in {prefilled - began:.1f} s, stored in {saved - prefilled:.1f} s: {stored:,} bytes, "
        f"{size} than the full cache (bfloat16); codecs {loaded_bundle.codec_bytes:,} bytes, once",
        highlight=False,
    )
    if json is not None:
        figures = {
            "tokens": ids.shape[1], "prefill_seconds": prefilled - began, "save_seconds": saved - prefilled,
            "file_bytes": stored, "full_bytes": full, "times_smaller": full / stored,
            "codec_bytes": loaded_bundle.codec_bytes,
        }  # fmt: skip
        config = {"model": model, "bundle": bundle.name, "text": source.name, "keep_window": keep_window}
        Record("save", figures, config).write(json)


def _encode(loaded: LoadedModel, text: str, tokens: int | None, positions: int) -> Tensor:
    """Token ids int64 ``[1, tokens]``, with what the tokenizer puts first by default."""
    ids = loaded.tokenizer(text, return_tensors="pt", verbose=False)["input_ids"]
    if tokens is not None and ids.shape[1] < tokens:
        raise InputError(f"the text has {ids.shape[1]} tokens, fewer than the {tokens} asked for; give more text")
    ids = ids[:, :tokens]
    if ids.shape[1] >= positions:
        raise InputError(
            f"the text has {ids.shape[1]} tokens, but the model has {positions} positions, of which some must be left to "
            "go on; store fewer of them with --tokens"
        )
    return ids
