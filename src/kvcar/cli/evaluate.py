"""``kvcar eval``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InputError
from .app import app
from .arguments import BundleSource, Context, Device, Dtype, Json, Model, Text, Window, Windows
from .console import check_writable, errors, out, progress_bars
from .recall import run_suite

if TYPE_CHECKING:
    from ..bundle import Bundle
    from ..evaluate.fidelity import Fidelity
    from ..models.load import LoadedModel

# Divergence on a text over the one that the fit measured, up to which the text counts as one of its kind.
_FITS_WELL = 1.5
_JUDGED_TOKENS, _NAMED_BLOCKS = 1024, 3

_EXAMPLES = """Measure a bundle against MODEL's own full cache, stepped through both.

[bold]Examples[/]

  kvcar eval demo --bundle demo-5x

  kvcar eval demo --bundle demo-5x --text test.txt --context 4096 --windows 4 --json figures.json

  kvcar eval demo --bundle demo-5x --window 0

  kvcar eval demo --bundle demo-5x --suite recall --items 60
"""


@app.command(name="eval", help=_EXAMPLES)
def evaluate(
    model: Model,
    bundle: BundleSource,
    text: Text = None,
    context: Context = None,
    windows: Windows = 2,
    window: Window = None,
    suite: Annotated[
        str | None,
        typer.Option(
            metavar="recall",
            help="Instead of a text, generated items: whether what lies far back is still found. --context is the longest passage then.",
        ),
    ] = None,
    items: Annotated[int, typer.Option(help="Questions of each task of a suite.")] = 60,
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--task",
            metavar="TASK",
            help="Of a suite: copy, pairs, passkey, needles, repeated, turns; may be repeated.",
        ),
    ] = None,
    json: Json = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Evaluate a bundle; the examples in the help text say the rest."""
    if suite is not None:
        if text is not None:
            raise InputError("a suite writes its own text; leave out --text or --suite")
        run_suite(suite, model, bundle, items, only, context, window, json, dtype, device)
        return
    from .. import evaluate as measure
    from ..bundle import Bundle
    from ..evaluate.fidelity import evaluation_context, fidelity_figures
    from ..models.load import load_model
    from ..record import Record
    from ..sizes import codecs_in_words, pays_from_tokens, size_in_words
    from ..text import evaluation_texts
    from .figures import fidelity_table

    fitted = Bundle.from_pretrained(bundle)
    check_writable(json)
    # What is wrong with these is said before the model is loaded.
    (source,) = evaluation_texts(text)
    context = evaluation_context(context, fitted.plan.geometry.max_positions)
    plan = fitted.plan.model_copy(update={"cache": fitted.plan.cache.with_window(window)})
    fitted_on_this = source.sha256 == fitted.fit.text_sha256
    if fitted_on_this:
        errors.print("[yellow]note:[/] the bundle was fitted on this very text, so the figures flatter it")
    with progress_bars() as tell:
        loaded = load_model(model, dtype, device, tell)
        result = measure(
            loaded.model, fitted, loaded.tokenizer, text, context=context, windows=windows, window=window, on_progress=tell
        )  # fmt: skip
    out.print(f"text: {source.name}", highlight=False)
    out.print(fidelity_table({Path(bundle).name or bundle: result}))
    if result.times_smaller < 1:
        size = size_in_words(plan, result.context, result.stored_bytes)
        out.print(f"at {result.context:,} tokens this cache is {size}", highlight=False)
    out.print(codecs_in_words(plan, fitted.codec_bytes), highlight=False)
    _print_worst(result)
    if not _print_verdict(fitted, result):
        _print_dearest(loaded, fitted, source.text, context)
    if json is not None:
        config = {
            "model": model, "bundle": Path(bundle).name, "text": source.name, "text_sha256": source.sha256,
            "dtype": str(loaded.model.dtype), "window": plan.window, "fitted_on_this_text": fitted_on_this,
            "fit": fitted.fit.model_dump(mode="json"),
        }  # fmt: skip
        figures = fidelity_figures(result) | {"pays_from_tokens": pays_from_tokens(plan, fitted.codec_bytes)}
        Record("fidelity", figures, config).write(json)


def _print_verdict(bundle: Bundle, result: Fidelity) -> bool:
    """Say in plain words whether the bundle keeps on this text what the fit promised; False where it does not."""
    from ..sizes import kept_exactly_in_words

    if line := kept_exactly_in_words(bundle.plan, result.finer_page_share):
        out.print(line, highlight=False)
    promised = (bundle.figures.get("held_out") or {}).get("kl_divergence")
    if not promised:
        return True
    found = result.kl_divergence.value
    if found <= _FITS_WELL * promised:
        out.print(
            f"fits this text well: {found:.5f} nats per token, where the fit measured {promised:.5f}", highlight=False
        )
        return True
    out.print(
        f"[yellow]costs more on this text than the fit measured on its own:[/] {found:.5f} nats per token instead of "
        f"{promised:.5f}, {found / promised:.1f} times as much. Fit again with --text on text of this kind, or to a larger cache "
        "(a smaller --times-smaller)",
        highlight=False,
    )
    return False


def _print_dearest(loaded: LoadedModel, bundle: Bundle, text: str, context: int) -> None:
    """Name the layers that cost most on this text, where the codecs know it."""
    from ..evaluate.layers import block_costs
    from ..text import up_to_windows

    tokens = min(context, _JUDGED_TOKENS)
    if tokens < bundle.plan.page_tokens:
        return
    costs = block_costs(loaded.model, bundle, up_to_windows(loaded.tokenizer, text, tokens, 1))
    if costs:
        named = ", ".join(map(str, costs[:_NAMED_BLOCKS]))
        out.print(f"of what its codes are expected to cost: {named}", highlight=False)


def _print_worst(result: Fidelity) -> None:
    by_window = sorted(enumerate(result.window_kl_divergences), key=lambda pair: -pair[1])[:3]
    worst = ", ".join(f"#{index} {value:.5f}" for index, value in by_window)
    out.print(
        f"worst windows by KL divergence: {worst}; worst hundredth of tokens: above {result.kl_divergence_worst_1_percent:.4f}"
    )
