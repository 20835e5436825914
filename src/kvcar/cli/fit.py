"""``kvcar fit``, and ``kvcar fit-structure`` for blocks and codecs of one's own."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError
from .app import app
from .arguments import Device, Dtype, Json, Model, Texts

if TYPE_CHECKING:
    from ..bundle import Bundle


_SHORT_TOKENS = 512

Output = Annotated[Path, typer.Option("--output", "-o", metavar="BUNDLE", help="Folder to write; must not exist.")]
TimesSmaller = Annotated[
    float | None,
    typer.Option(help="Times smaller than the full bfloat16 cache at 4,096 tokens, all bytes counted. Default: 5."),
]
Tokens = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Tokens of the text to take, the last two windows of 1024 to compare plans on. Default: 24576 (stored: 65536), "
        "or what the text has.",
    ),
]
Window = Annotated[int, typer.Option(min=0, help="Recent tokens kept exact, a multiple of 64.")]
Seed = Annotated[int, typer.Option(help="Of everything random.")]
Check = Annotated[bool, typer.Option(help="Hold out a tenth of the text and measure the bundle on it.")]
Force = Annotated[bool, typer.Option("--force", help="Replace a bundle that is already there.")]

_FIT = """Fit a compressed cache for MODEL and write it to a folder.

Blocks of layers and bits of latents are found by what errors do to the model's output, within the limits of a profile: fast
(narrow blocks), balanced (the default), small (many layers to a block) or stored (contexts on disk). A tenth of the text is
held out, and the bundle measured on it. Half of what is fitted on the model writes itself, so that the bundle holds on other
text too. A GPU is taken where there is one; kvcar.fit has more options.

[bold]Examples[/]

  kvcar fit demo -o demo-8x --times-smaller 8

  kvcar fit demo -o demo-small --profile small --times-smaller 12 --text corpus.txt

  kvcar fit demo -o demo-good --max-kl 0.005
"""


@app.command(help=_FIT)
def fit(
    model: Model,
    output: Output,
    text: Texts = None,
    times_smaller: TimesSmaller = None,
    max_kl: Annotated[
        float | None,
        typer.Option(help="Smallest cache within this KL divergence on held-out text, instead of a size to reach."),
    ] = None,
    profile: Annotated[
        str | None, typer.Option(help="How wide blocks may be: fast, balanced, small or stored. Default: balanced.")
    ] = None,
    tokens: Tokens = None,
    samples: Annotated[
        bool, typer.Option(help="Fit on as much that the model writes itself, of many kinds, as on the text.")
    ] = True,
    window: Annotated[int, typer.Option(min=0, hidden=True, help="Recent tokens kept exact, a multiple of 64.")] = 64,
    force: Force = False,
    json: Json = None,
    dtype: Dtype = "auto",
) -> None:
    """Fit a bundle whose structure is searched; the examples in the help text say the rest."""
    options = {"times_smaller": times_smaller, "max_kl": max_kl, "profile": profile}
    _fit(model, output, text, tokens, window, options, True, samples, force, json, dtype, "auto")


_STRUCTURE = """Fit blocks and codecs that you choose yourself, instead of those that 'kvcar fit' finds.

[bold]Examples[/]

  kvcar fit-structure HuggingFaceTB/SmolLM2-360M -o bundle --bits 3 --layers-per-block 2

  kvcar fit-structure demo -o lossless --codec identity

  kvcar fit-structure demo -o paper --codec autoencoder --latent-bits 16 --key-latents 96 --value-latents 96 --steps 0
"""


@app.command("fit-structure", help=_STRUCTURE)
def fit_structure(
    model: Model,
    output: Output,
    text: Texts = None,
    codec: Annotated[str, typer.Option(help="linear, autoencoder or identity.")] = "linear",
    times_smaller: Annotated[
        float | None,
        typer.Option(help="Times smaller at 4,096 tokens, all bytes counted. Default: 5 (identity: lossless)."),
    ] = None,
    bits: Annotated[float | None, typer.Option(help="Average stored bits per key or value element.")] = None,
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
    latent_bits: Annotated[
        int, typer.Option(help="Bits of each latent of an autoencoder, or with --key-latents: 1 to 8, or 16.")
    ] = 8,
    reuse: Annotated[
        Path | None,
        typer.Option(metavar="BUNDLE", help="Share the slots that this bundle of 'kvcar paper similarity' shares."),
    ] = None,
    metric: Annotated[
        str, typer.Option(help="Of a block's directions: std, or effect (measured errors on the output).")
    ] = "std",
    scales: Annotated[
        str,
        typer.Option(help="static (in the bundle), or dynamic (per token, the paper's int8; costs 4 bytes a block)."),
    ] = "static",
    steps: Annotated[int, typer.Option(min=0, help="Training steps of each autoencoder.")] = 200,
    effect_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens on which the effect of errors is measured, with --metric effect.")
    ] = 16_384,
    tokens: Tokens = None,
    window: Window = 64,
    seed: Seed = 0,
    check: Check = True,
    force: Force = False,
    json: Json = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Fit a bundle whose structure is given; the examples in the help text say the rest."""
    from ..bundle import Bundle
    from ..fit.options import Structure

    given: dict[str, Any] = {
        "codec": codec, "bits": bits, "layers_per_block": layers_per_block, "heads_per_block": heads_per_block,
        "layers": None if layers is None else _numbers(layers), "key_latents": key_latents, "value_latents": value_latents,
        "reuses": () if reuse is None else Bundle.from_pretrained(reuse).plan.reuses,
        "latent_bits": latent_bits, "metric": metric, "scales": scales, "steps": steps,
    }  # fmt: skip
    options = {
        "structure": Structure(**given), "times_smaller": times_smaller, "effect_tokens": effect_tokens, "seed": seed
    }  # fmt: skip
    _fit(model, output, text, tokens, window, options, check, False, force, json, dtype, device)


def _fit(
    model: str,
    output: Path,
    text: list[Path] | None,
    tokens: int | None,
    window: int,
    given: dict[str, Any],
    check: bool,
    samples: bool,
    force: bool,
    json: Path | None,
    dtype: str,
    device: str,
) -> None:
    """Fit, write and print; what both commands share."""
    from ..bundle import check_target
    from ..fit.checks import check_request
    from ..fit.fit import fit as fit_bundle
    from ..fit.options import FitOptions
    from ..fit.processes import is_main_process
    from ..models.geometry import read_geometry
    from ..models.load import load_config, load_model
    from ..plan import CacheConfig
    from ..record import Record
    from ..text import given_texts
    from .console import check_writable, progress_bars

    options = FitOptions(cache=CacheConfig(window), **given)  # refused before any work is done
    check_target(output, force)
    check_writable(json)
    texts = given_texts(text)
    with progress_bars() as on_progress:
        check_request(read_geometry(load_config(model, on_progress)), options, tokens, len(texts))
        loaded = load_model(model, dtype, device, on_progress)
        bundle = fit_bundle(
            loaded.model, loaded.tokenizer, text, **given, tokens=tokens, window=window, check=check,
            samples=samples, name=model,
            on_progress=on_progress,
        )  # fmt: skip
    if not is_main_process():
        return  # under `accelerate launch` all have the same bundle, and one writes it
    bundle.save_pretrained(output, overwrite=force)
    _report(bundle, model, output)
    if json is not None:
        Record("fit", dict(bundle.figures), config={"model": model, **options.as_dict()}).write(json)


def _report(bundle: Bundle, model: str, output: Path) -> None:
    """Print what was written, what it costs, and what to do with it."""
    from ..bundle import windows_in_words
    from ..sizes import codecs_in_words, kept_exactly_in_words, size_in_words, stored_bytes
    from .console import out

    plan, figures, geometry = bundle.plan, bundle.figures, bundle.plan.geometry
    size = size_in_words(plan, figures["tokens"], figures["stored_bytes"])
    out.print(f"wrote [bold]{output}[/]: at {figures['tokens']:,} tokens {size}, all bytes counted", highlight=False)
    if figures["tokens"] > _SHORT_TOKENS:
        short = size_in_words(plan, _SHORT_TOKENS, stored_bytes(plan, _SHORT_TOKENS, 2))
        out.print(f"a shorter cache is mostly sinks and window: at {_SHORT_TOKENS:,} tokens {short}", highlight=False)
    if bundle.fit.tokens:
        compared = f"; plans compared on {2 * bundle.fit.context:,} more" if "profile" in bundle.fit.options else ""
        out.print(f"fitted on {bundle.fit.tokens:,} tokens of {bundle.fit.text}{compared}", highlight=False)
    out.print(codecs_in_words(bundle.plan, bundle.codec_bytes), highlight=False)
    for line in windows_in_words(geometry):
        out.print(line, highlight=False)
    if found := figures.get("held_out"):
        out.print(
            f"on {found['tokens']:,} tokens of held-out text: KL divergence {found['kl_divergence']:.5f} nats per token, same "
            f"top-1 token {100 * found['same_top']:.2f} %, perplexity x {found['perplexity_ratio']:.4f}"
        )
        if line := kept_exactly_in_words(plan, found.get("finer_page_share", 0.0)):
            out.print(line, highlight=False)
    if len(kinds := figures.get("kl_divergence_by_kind", {})) > 1:
        by_kind = ", ".join(f"{kind} {kl:.5f}" for kind, kl in kinds.items())
        out.print(f"KL divergence by kind of text: {by_kind}; other kinds may cost more", highlight=False)
    if curve := figures.get("curve"):
        points = ", ".join(f"{size:g}x: {kl:.4f}" for size, kl in curve)
        out.print(f"expected KL divergence by size: {points}")
    elif bundle.fit.options.get("profile") == "stored":
        size = bundle.fit.options["times_smaller"]
        out.print(f"saved with 'kvcar save', contexts take about {size:g} times less than the full cache")
    where = shlex.join([model, "--bundle", str(output)])
    out.print(f"next: kvcar eval {where}", markup=False, highlight=False, soft_wrap=True)
    out.print(
        f'      kvcar generate {where} --prompt "Once upon a time"', markup=False, highlight=False, soft_wrap=True
    )


def _numbers(text: str) -> tuple[int, ...]:
    """``0-2,5`` as 0, 1, 2, 5; raises InputError."""
    numbers: list[int] = []
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdigit() or (last and not last.isdigit()):
            raise InputError(f"{text!r} is no list of layers; write for example 0-9,12")
        numbers += range(int(first), int(last or first) + 1)
    return tuple(dict.fromkeys(numbers))
