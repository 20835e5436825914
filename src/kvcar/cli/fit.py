"""``kvcar fit``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import Tensor

from ..bundle import Bundle, check_target
from ..errors import InputError
from ..evaluate.fidelity import Fidelity, fidelity_figures, measure_fidelity
from ..sizes import compressed_size
from ..fit.fit import fit_bundle
from ..fit.options import FitOptions
from ..text import TextSource, interleaved, joined, token_windows
from ..models.load import LoadedModel, load_model
from ..fit.processes import state
from ..fit.profile_fit import ProfileFit, fit_profile
from ..fit.profiles import DEFAULT_PROFILE, PROFILES, ProfileOptions
from ..progress import OnProgress, counter
from ..record import Record
from ..report.card import model_card
from ..cache.attach import attach
from ..cache.cache import KVCarCache
from ..paper.effect import latents_by_effect
from .app import app
from .arguments import Device, Dtype, Json, Model, Texts
from .console import check_writable, out, progress_bars
from .figures import fidelity_table
from .texts import fit_texts, windows_of_all

DEFAULT_TOKENS = PROFILES[DEFAULT_PROFILE].fit_tokens
_STORED_TOKENS = PROFILES["stored"].fit_tokens
_CONTEXT = 1024
_CHECK_WINDOWS = 2
_EFFECT_WINDOWS, _EFFECT_CONTEXT = 2, 256

_EXAMPLES = """Fit a compressed cache for MODEL and write it to a folder.

Blocks of layers and bits of latents are found by what errors do to the model's output, within the limits of a profile: fast
(narrow blocks), balanced (the default) or small (many layers to a block). Options that fix the
structure (--codec, --bits, --layers-per-block and so on) fit just that instead.

[bold]Examples[/]

  kvcar fit demo -o demo-8x --times-smaller 8

  kvcar fit demo -o demo-small --profile small --times-smaller 12 --text corpus.txt

  kvcar fit demo -o demo-good --max-kl 0.005

  kvcar fit HuggingFaceTB/SmolLM2-360M -o bundle --bits 3 --layers-per-block 2

  kvcar fit demo -o paper --codec autoencoder --latent-bits 16 --bits 8
"""


@app.command(help=_EXAMPLES)
def fit(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="BUNDLE", help="Folder to write; must not exist.")],
    text: Texts = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help=f"Tokens to fit on. Default: {DEFAULT_TOKENS} (stored: {_STORED_TOKENS}), or what the text has."
        ),
    ] = None,
    profile: Annotated[
        str | None, typer.Option(help=f"How wide blocks may be: {', '.join(PROFILES)}. Default: {DEFAULT_PROFILE}.")
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(help="Smallest cache within this KL divergence on held-back text, instead of a size to reach."),
    ] = None,
    effect_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens on which the effect of errors is measured. Default: 8192.")
    ] = None,
    codec: Annotated[
        str | None, typer.Option(help="linear, autoencoder or identity, with a structure of your own.")
    ] = None,
    bits: Annotated[float | None, typer.Option(help="Average stored bits per key or value element.")] = None,
    times_smaller: Annotated[
        float | None,
        typer.Option(
            help="Times smaller than the full bfloat16 cache at 4,096 tokens, all bytes counted. Default: 5 (identity: lossless)."
        ),
    ] = None,
    layers_per_block: Annotated[int | None, typer.Option(min=1, help="Adjacent layers coded together.")] = None,
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
        str | None,
        typer.Option(help="How --key-latents and --value-latents are shared among blocks: even, or effect (measured)."),
    ] = None,
    reuse: Annotated[
        Path | None,
        typer.Option(metavar="BUNDLE", help="Share the slots that this bundle of 'kvcar similarity' shares."),
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="Of a block's directions: std, or effect (measured errors on the output).")
    ] = None,
    scales: Annotated[
        str | None,
        typer.Option(help="static (in the bundle), or dynamic (per token, the paper's int8; costs 4 bytes a block)."),
    ] = None,
    latent_bits: Annotated[
        int | None, typer.Option(help="Bits of each latent of an autoencoder, or with --key-latents: 1 to 8, or 16.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=0, help="Training steps of each autoencoder.")] = None,
    window: Annotated[int, typer.Option(min=0, help="Recent tokens kept exact, a multiple of 64.")] = 64,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    check: Annotated[bool, typer.Option(help="Hold back a tenth of the text and measure the bundle on it.")] = True,
    force: Annotated[bool, typer.Option("--force", help="Replace a bundle that is already there.")] = False,
    json: Json = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Fit a bundle; the examples in the help text say the rest."""
    structure: dict[str, Any] = {
        "codec": codec, "bits": bits, "layers_per_block": layers_per_block, "heads_per_block": heads_per_block,
        "layers": None if layers is None else _numbers(layers), "key_latents": key_latents,
        "value_latents": value_latents, "reuses": None if reuse is None else Bundle.load(reuse).plan.reuses,
        "metric": metric, "scales": scales, "latent_bits": latent_bits, "steps": steps,
    }  # fmt: skip
    structure = {name: value for name, value in structure.items() if value is not None}
    searched: dict[str, Any] = {
        "profile": profile, "max_kl": max_kl, "effect_tokens": effect_tokens
    }  # fmt: skip
    searched = {name: value for name, value in searched.items() if value is not None}
    common = {"times_smaller": times_smaller, "window": window, "seed": seed}
    if structure or allocate is not None:
        if extra := set(searched) - ({"effect_tokens"} if metric == "effect" else set()):
            raise InputError(
                f"{_flags(extra)} finds the structure, and {_flags(structure or ['allocate'])} fixes it; give one of them"
            )
        options = FitOptions(**structure, **searched, **common)
    else:
        options = ProfileOptions(**searched, **common)
    if allocate not in (None, "even", "effect"):
        raise InputError(f"allocate must be even or effect, got {allocate!r}")
    check_target(output, force)
    check_writable(json)
    sources, held = fit_texts(text, check)
    with progress_bars() as tell:
        loaded = load_model(model, dtype, device, tell)
        most = PROFILES[options.profile].fit_tokens if isinstance(options, ProfileOptions) else DEFAULT_TOKENS
        windows, source = fit_windows(loaded, sources, tokens, most), joined(sources)
        found = None
        if isinstance(options, ProfileOptions):
            found = fit_profile(loaded.model, model, windows, source, options, tell)
            bundle = found.bundle
        else:
            short = windows[:_EFFECT_WINDOWS, :_EFFECT_CONTEXT]
            by_effect = partial(latents_by_effect, loaded.model, short, on_progress=tell)
            bundle = fit_bundle(
                loaded.model, model, windows, source, options, tell, by_effect if allocate == "effect" else None
            )
        measured = check_bundle(loaded, bundle, held, tell) if check and held else None
    if not state().is_main_process:
        return  # under `accelerate launch` all have the same bundle, and one writes it
    bundle.save(output, model_card(bundle, measured), overwrite=force)
    _tell(bundle, output, measured)
    if found is not None:
        _tell_curve(found)
    if json is not None:
        figures = fidelity_figures(measured) if measured else {}
        figures |= {
            "stored_bytes_at_4096_tokens": compressed_size(bundle.plan, 2)(4096, 1),
            "codec_bytes": bundle.codec_bytes,
        }
        if found is not None:
            figures |= {
                "held_back_kl": found.held_kl,
                "curve": [[point.times_smaller, point.predicted_kl] for point in found.curve],
            }  # fmt: skip
        Record("fit", figures, config={"model": model, **options.as_dict()}).write(json)


def _flags(names: Iterable[str]) -> str:
    return ", ".join("--" + name.replace("_", "-") for name in sorted(names))


def _tell_curve(found: ProfileFit) -> None:
    """What other sizes would cost."""
    if found.curve:
        points = ", ".join(f"{p.times_smaller:g}x: {p.predicted_kl:.4f}" for p in found.curve)
        out.print(f"expected KL divergence by size: {points}")
    else:
        out.print(
            f"saved with 'kvcar save', contexts take about {found.times_smaller:g} times less than the full cache"
        )


def fit_windows(
    loaded: LoadedModel, sources: Sequence[TextSource], tokens: int | None = None, most: int = DEFAULT_TOKENS
) -> Tensor:
    """Token ids int64 ``[N, context]`` of so many tokens, or of up to ``most``; raises InputError where a text is too short."""
    context = min(_CONTEXT, loaded.model.config.get_text_config().max_position_embeddings)
    if tokens is None:
        return windows_of_all(loaded.tokenizer, sources, context, most // context)
    context = min(context, tokens)
    if context < 2:
        raise InputError(f"fitting needs more than {tokens} tokens")
    each = tokens // context // len(sources)
    if not each:
        raise InputError(f"{tokens} tokens are less than a window of {context} for each of {len(sources)} texts")
    return interleaved([token_windows(loaded.tokenizer, source.text, context, each) for source in sources])


def _numbers(text: str) -> tuple[int, ...]:
    """``0-2,5`` as 0, 1, 2, 5; raises InputError."""
    numbers: list[int] = []
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdigit() or (last and not last.isdigit()):
            raise InputError(f"{text!r} is no list of layers; write for example 0-9,12")
        numbers += range(int(first), int(last or first) + 1)
    return tuple(dict.fromkeys(numbers))


def check_bundle(loaded: LoadedModel, bundle: Bundle, held: Sequence[TextSource], tell: OnProgress) -> Fidelity | None:
    """Quality on held-back text, None where it is too short."""
    context = min(_CONTEXT, bundle.plan.geometry.max_positions)
    try:
        windows = windows_of_all(loaded.tokenizer, held, context, max(_CHECK_WINDOWS, len(held)))
    except InputError:
        return None  # the held-back tenth of a short text is shorter than a window; the card says "not measured"
    on_chunk = counter(tell, "check on held-back text", windows.numel())
    with attach(loaded.model, bundle):
        caches = {"check": lambda: KVCarCache(bundle, keep_decoded=True)}
        return measure_fidelity(loaded.model, windows, caches, on_chunk)["check"]


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
