"""``kvcar fit``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from torch import Tensor

from ..bundle import Bundle, check_target
from ..errors import InputError
from ..evaluate.fidelity import Fidelity, fidelity_figures, measure_fidelity
from ..evaluate.size import compressed_size
from ..fit.fit import fit_bundle
from ..fit.options import FitOptions
from ..fit.text import TextSource, token_windows
from ..models.load import LoadedModel, load_model
from ..plan import Scales
from ..progress import OnProgress, counter
from ..record import Record
from ..report.card import model_card
from ..runtime.attach import attach
from ..runtime.cache import KVCarCache
from ..train.effect import latents_by_effect
from .app import app
from .arguments import Device, Dtype, Json, Model, Text
from .console import check_writable, out, progress_bars
from .figures import fidelity_table
from .texts import fit_and_check_text, up_to_windows

DEFAULT_TOKENS = 24_576
_CONTEXT = 1024
_CHECK_WINDOWS = 2
_EFFECT_WINDOWS, _EFFECT_CONTEXT = 2, 256

_EXAMPLES = """Fit a compressed cache for MODEL and write it to a folder.

[bold]Examples[/]

  kvcar fit demo -o demo-5x --times-smaller 5

  kvcar fit demo -o demo-8x --times-smaller 8 --layers-per-block 5 --text corpus.txt

  kvcar fit HuggingFaceTB/SmolLM2-360M -o bundle --bits 3

  kvcar fit demo -o paper --codec autoencoder --latent-bits 16 --bits 8
"""


@app.command(help=_EXAMPLES)
def fit(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="BUNDLE", help="Folder to write; must not exist.")],
    text: Text = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help=f"Tokens to fit on. Default: {DEFAULT_TOKENS}, or what the text has.")
    ] = None,
    codec: Annotated[str, typer.Option(help="linear, autoencoder or identity.")] = "linear",
    bits: Annotated[float | None, typer.Option(help="Average stored bits per key or value element.")] = None,
    times_smaller: Annotated[
        float | None,
        typer.Option(
            help="Times smaller than the full bfloat16 cache at 4,096 tokens, all bytes counted. Default: 5 (identity: lossless)."
        ),
    ] = None,
    layers_per_block: Annotated[int, typer.Option(min=1, help="Adjacent layers coded together.")] = 1,
    heads_per_block: Annotated[
        int | None, typer.Option(min=1, help="KV heads coded together. Default: all of a layer.")
    ] = None,
    layers: Annotated[
        str | None, typer.Option(metavar="LIST", help="Layers to compress, such as 0-9,12; the others stay exact.")
    ] = None,
    key_latents: Annotated[
        int | None, typer.Option(help="Latents of a layer's keys, --latent-bits each, instead of a size to reach.")
    ] = None,
    value_latents: Annotated[int | None, typer.Option(help="The same of a layer's values.")] = None,
    allocate: Annotated[
        str,
        typer.Option(help="How --key-latents and --value-latents are shared among blocks: even, or effect (measured)."),
    ] = "even",
    reuse: Annotated[
        Path | None,
        typer.Option(metavar="BUNDLE", help="Share the slots that this bundle of 'kvcar similarity' shares."),
    ] = None,
    scales: Annotated[
        str,
        typer.Option(help="static (in the bundle), or dynamic (per token, the paper's int8; costs 4 bytes a block)."),
    ] = "static",
    latent_bits: Annotated[
        int, typer.Option(help="Bits of each latent of an autoencoder, or with --key-latents: 1 to 8, or 16.")
    ] = 8,
    steps: Annotated[int, typer.Option(min=0, help="Training steps of each autoencoder.")] = 200,
    window: Annotated[int, typer.Option(min=0, help="Recent tokens kept exact, a multiple of 64.")] = 64,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    check: Annotated[bool, typer.Option(help="Hold back a tenth of the text and measure the bundle on it.")] = True,
    force: Annotated[bool, typer.Option("--force", help="Replace a bundle that is already there.")] = False,
    json: Json = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Fit a bundle; the examples in the help text say the rest."""
    options = FitOptions(
        codec=codec, bits=bits, times_smaller=times_smaller, layers_per_block=layers_per_block,
        heads_per_block=heads_per_block, latent_bits=latent_bits, steps=steps, window=window, seed=seed,
        layers=None if layers is None else _numbers(layers), key_latents=key_latents, value_latents=value_latents,
        reuses=() if reuse is None else Bundle.load(reuse).plan.reuses, scales=_scales(scales),
    )  # fmt: skip
    if allocate not in ("even", "effect"):
        raise InputError(f"allocate must be even or effect, got {allocate!r}")
    check_target(output, force)
    check_writable(json)
    source, held = fit_and_check_text(text, check)
    with progress_bars() as tell:
        loaded = load_model(model, dtype, device, tell)
        windows = fit_windows(loaded, source, tokens)
        short = windows[:_EFFECT_WINDOWS, :_EFFECT_CONTEXT]
        by_effect = partial(latents_by_effect, loaded.model, short, on_progress=tell)
        bundle = fit_bundle(
            loaded.model, model, windows, source, options, tell, by_effect if allocate == "effect" else None
        )
        measured = check_bundle(loaded, bundle, held, tell) if check and held is not None else None
    bundle.save(output, model_card(bundle, measured), overwrite=force)
    _tell(bundle, output, measured)
    if json is not None:
        figures = fidelity_figures(measured) if measured else {}
        figures |= {
            "stored_bytes_at_4096_tokens": compressed_size(bundle.plan, 2)(4096, 1),
            "codec_bytes": bundle.codec_bytes,
        }
        Record("fit", figures, config={"model": model, **options.as_dict()}).write(json)


def fit_windows(loaded: LoadedModel, source: TextSource, tokens: int | None = None) -> Tensor:
    """Token ids int64 ``[N, context]`` that a fit reads by default; raises InputError where the text is too short."""
    context = min(_CONTEXT, loaded.model.config.get_text_config().max_position_embeddings)
    if tokens is None:
        return up_to_windows(loaded.tokenizer, source.text, context, DEFAULT_TOKENS // context)
    context = min(context, tokens)
    if context < 2:
        raise InputError(f"fitting needs more than {tokens} tokens")
    return token_windows(loaded.tokenizer, source.text, context, tokens // context)


def _numbers(text: str) -> tuple[int, ...]:
    """``0-2,5`` as 0, 1, 2, 5; raises InputError."""
    numbers: list[int] = []
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdigit() or (last and not last.isdigit()):
            raise InputError(f"{text!r} is no list of layers; write for example 0-9,12")
        numbers += range(int(first), int(last or first) + 1)
    return tuple(dict.fromkeys(numbers))


def _scales(text: str) -> Scales:
    if text not in ("static", "dynamic"):
        raise InputError(f"scales must be static or dynamic, got {text!r}")
    return "static" if text == "static" else "dynamic"


def check_bundle(loaded: LoadedModel, bundle: Bundle, held: TextSource, tell: OnProgress) -> Fidelity | None:
    """Quality on held-back text, None where it is too short."""
    context = min(_CONTEXT, bundle.plan.geometry.max_positions)
    try:
        windows = up_to_windows(loaded.tokenizer, held.text, context, _CHECK_WINDOWS)
    except InputError:
        return None  # the held-back tenth of a short text is shorter than a window; the card says "not measured"
    on_chunk = counter(tell, "check on held-back text", windows.numel())
    with attach(loaded.model, bundle):
        return measure_fidelity(loaded.model, windows, {"check": lambda: KVCarCache(bundle)}, on_chunk)["check"]


def _tell(bundle: Bundle, output: Path, measured: Fidelity | None) -> None:
    tokens = min(4096, bundle.plan.geometry.max_positions)
    stored = compressed_size(bundle.plan, bundle_element_bytes(bundle))(tokens, 1)
    full = bundle.plan.geometry.full_bytes(tokens)
    out.print(f"wrote [bold]{output}[/]: {full / stored:.2f} times smaller at {tokens:,} tokens, all bytes counted")
    sliding = bundle.plan.geometry.sliding_layers
    if sliding:
        out.print(f"{len(sliding)} of {bundle.plan.geometry.layers} layers attend to a sliding window and stay exact")
    if measured is not None:
        out.print(fidelity_table({"held-back text": measured}))


def bundle_element_bytes(bundle: Bundle) -> int:
    """Bytes of an element as the model computed it when the bundle was fitted."""
    return {"float32": 4, "float64": 8}.get(bundle.model.dtype, 2)
