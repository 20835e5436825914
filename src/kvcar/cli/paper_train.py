"""``kvcar paper train`` and ``kvcar paper finetune``."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .arguments import BundlePath, Device, Dtype, Json, Model, Text
from .paper import paper

if TYPE_CHECKING:
    from torch import Tensor

    from ..models.load import LoadedModel
    from ..paper.options import TrainOptions, TrainResult
    from ..record import Record
    from ..text import TextSource

Output = Annotated[Path, typer.Option("--output", "-o", metavar="BUNDLE", help="Folder to write; must not exist.")]
Context = Annotated[int, typer.Option(min=2, help="Tokens of a training window.")]
Tokens = Annotated[int, typer.Option(min=2, help="Tokens to train on, or fewer if the text has fewer.")]
Objective = Annotated[
    str | None, typer.Option(help="kl (to the full-cache model, the default) or ce (the text's cross-entropy).")
]
L1Weight = Annotated[
    float | None, typer.Option(help="Lambda: weight of the mean absolute errors of keys and values. Default: 0.")
]
Steps = Annotated[int | None, typer.Option(help="Steps for all layers together, stage (b). Default: 100.")]
Rate = Annotated[float | None, typer.Option(help="Adam's learning rate in stage (b). Default: 3e-4.")]
WindowsPerStep = Annotated[int | None, typer.Option(help="Windows whose gradients make one step. Default: 2.")]
Accumulation = Annotated[int | None, typer.Option(help="Passes they are spread over, to save memory. Default: 1.")]
ValidationWindows = Annotated[int | None, typer.Option(help="Last windows, held out for validation. Default: 2.")]
ValidateEvery = Annotated[int | None, typer.Option(help="Steps between validations. Default: 20.")]
Patience = Annotated[int | None, typer.Option(help="Validations without progress that end it. Default: 0, never.")]
StepTokens = Annotated[
    int | None, typer.Option(help="Tokens that see each other exactly. Default: 1, as in token-by-token decoding.")
]
MixedPrecision = Annotated[str | None, typer.Option(help="no or bf16, for the model's own products. Default: no.")]
Seed = Annotated[int | None, typer.Option(help="Of everything random. Default: 0.")]
Checkpoint = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="Where to keep the state. Default: BUNDLE.training.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint of a run that was killed.")]
Force = Annotated[bool, typer.Option("--force", help="Replace a bundle that is already there.")]

_TRAIN = """Train a bundle's codecs inside MODEL: the paper's Algorithm 1, by default on KL divergence to the full cache.

[bold]Examples[/]

  kvcar paper train demo --bundle start -o trained --joint-steps 200 --text corpus.txt

  kvcar paper train demo --bundle start -o paper --paper

  kvcar paper train demo --bundle start -o trained --joint-steps 200 --text corpus.txt --resume

Several GPUs: accelerate launch -m kvcar paper train ... (torchrun on CPUs).
"""


@paper.command(help=_TRAIN)
def train(
    model: Model,
    bundle: BundlePath,
    output: Output,
    text: Text = None,
    recipe: Annotated[
        bool, typer.Option("--paper", help="The paper's recipe: random start, cross-entropy + L1, both stages.")
    ] = False,
    context: Context = 512,
    tokens: Tokens = 24_576,
    objective: Objective = None,
    l1_weight: L1Weight = None,
    layer_steps: Annotated[
        int | None, typer.Option(help="Steps for each layer alone, stage (a). Default: 0; paper: 50.")
    ] = None,
    joint_steps: Steps = None,
    joint_trains: Annotated[str | None, typer.Option(help="What stage (b) changes: encoders, decoders or all.")] = None,
    start: Annotated[str | None, typer.Option(help="bundle (go on from it) or random (autoencoders only).")] = None,
    learning_rate: Rate = None,
    layer_learning_rate: Annotated[float | None, typer.Option(help="The same in stage (a). Default: 1e-3.")] = None,
    windows_per_step: WindowsPerStep = None,
    accumulation: Accumulation = None,
    validation_windows: ValidationWindows = None,
    validate_every: ValidateEvery = None,
    patience: Patience = None,
    step_tokens: StepTokens = None,
    mixed_precision: MixedPrecision = None,
    seed: Seed = None,
    checkpoint: Checkpoint = None,
    resume: Resume = False,
    check: Annotated[bool, typer.Option(help="Hold out a tenth of the text and measure the bundle on it.")] = True,
    force: Force = False,
    json: Json = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Train a bundle; the examples in the help text say the rest."""
    options = _options(locals(), recipe)
    from ..bundle import Bundle, check_target
    from ..fit.fit import check_bundle
    from ..fit.processes import is_main_process
    from ..fit.windows import held_out_windows
    from ..models.load import load_model
    from ..paper.algorithm1 import train_bundle
    from ..text import fit_and_check_text
    from .console import check_writable, progress_bars, step_teller

    first = Bundle.from_pretrained(bundle)
    check_target(output, force)
    check_writable(json)
    source, held_out = fit_and_check_text(text, check)
    with progress_bars() as on_progress:
        loaded = load_model(model, dtype, _own_device(device), on_progress)
        windows = _windows(loaded, source, context, tokens)
        folder = checkpoint or output.with_name(output.name + ".training")
        result = train_bundle(loaded.model, first, windows, source, options, folder, resume, on_progress, step_teller())
        if not is_main_process():
            return
        trained = result.bundle
        if check and held_out is not None:
            held_windows = held_out_windows(loaded.model, loaded.tokenizer, [held_out])
            trained = check_bundle(loaded.model, trained, held_windows, on_progress)
    trained.save_pretrained(output, overwrite=force)
    measured = trained.figures.get("held_out")
    _print_result(output, result, measured)
    if json is not None:
        _record("train", model, bundle, source, options, result, measured).write(json)


_FINETUNE = """Tune MODEL's own attention weights to a bundle (the paper's Algorithm 2 after heads were chosen to be shared).

[bold]Examples[/]

  kvcar paper similarity demo -o shared --measure kl --count 20

  kvcar paper finetune demo --bundle shared -o shared-tuned --model-output demo-tuned --joint-steps 100
"""


@paper.command(help=_FINETUNE)
def finetune(
    model: Model,
    bundle: BundlePath,
    output: Output,
    model_output: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the tuned model goes; must not exist.")],
    text: Text = None,
    tuned: Annotated[str, typer.Option(help="kv (key and value projections) or attention (all its weights).")] = "kv",
    context: Context = 512,
    tokens: Tokens = 24_576,
    objective: Objective = None,
    l1_weight: L1Weight = None,
    joint_steps: Steps = None,
    learning_rate: Rate = None,
    windows_per_step: WindowsPerStep = None,
    accumulation: Accumulation = None,
    validation_windows: ValidationWindows = None,
    validate_every: ValidateEvery = None,
    patience: Patience = None,
    step_tokens: StepTokens = None,
    mixed_precision: MixedPrecision = None,
    seed: Seed = None,
    checkpoint: Checkpoint = None,
    resume: Resume = False,
    force: Force = False,
    json: Json = None,
    device: Device = "auto",
) -> None:
    """Tune a model to a bundle; the examples in the help text say the rest."""
    options = _options(locals(), recipe=False)
    from ..bundle import Bundle, check_target
    from ..errors import InputError
    from ..fit.processes import is_main_process
    from ..models.load import load_model
    from ..paper.finetune import finetune_weights
    from ..text import fit_and_check_text
    from .console import check_writable, out, progress_bars, step_teller

    if tuned not in ("kv", "attention"):
        raise InputError(f"tuned must be kv or attention, got {tuned!r}")
    first = Bundle.from_pretrained(bundle)
    check_target(output, force)
    check_writable(json)
    if model_output.exists():
        raise InputError(f"{model_output} exists; choose another folder for the tuned model")
    source, _ = fit_and_check_text(text, hold_out=False)
    with progress_bars() as on_progress:
        loaded = load_model(model, "float32", _own_device(device), on_progress)
        windows = _windows(loaded, source, context, tokens)
        folder = checkpoint or output.with_name(output.name + ".training")
        result = finetune_weights(
            loaded.model, first, windows, source, options, "kv" if tuned == "kv" else "attention", folder, resume,
            on_progress, step_teller(),
        )  # fmt: skip
    if not is_main_process():
        return
    loaded.model.save_pretrained(model_output)
    loaded.tokenizer.save_pretrained(model_output)
    result.bundle.save_pretrained(output, overwrite=force)
    out.print(f"wrote the tuned model to [bold]{model_output}[/]")
    _print_result(output, result, None)
    if json is not None:
        _record("finetune", model, bundle, source, options, result, None).write(json)


def _options(given: dict[str, Any], recipe: bool) -> TrainOptions:
    """Options from a command's arguments; those not given keep their defaults."""
    from ..paper.options import TrainOptions

    names = {field.name for field in fields(TrainOptions)}
    chosen = {name: value for name, value in given.items() if name in names and value is not None}
    return TrainOptions.paper(**chosen) if recipe else TrainOptions(**chosen)


def _own_device(device: str) -> str:
    """The GPU of this process where several share the work."""
    from ..fit.processes import process_count, process_device

    return process_device() if device == "auto" and process_count() > 1 else device


def _windows(loaded: LoadedModel, source: TextSource, context: int, tokens: int) -> Tensor:
    from ..text import up_to_windows

    context = min(context, loaded.model.config.get_text_config().max_position_embeddings, tokens)
    return up_to_windows(loaded.tokenizer, source.text, context, max(1, tokens // context))


def _print_result(output: Path, result: TrainResult, measured: dict[str, Any] | None) -> None:
    from .console import out

    last = result.history[-1]["stage"] if result.history else None
    losses = [e["validation_loss"] for e in result.history if "validation_loss" in e and e["stage"] == last]
    change = f"; validation loss {losses[0]:.4f} -> {min(losses):.4f} nats per token" if losses else ""
    out.print(f"wrote [bold]{output}[/]{change}")
    if measured is not None:
        out.print(f"KL divergence on held-out text: {measured['kl_divergence']:.5f} nats per token")


def _record(
    kind: str,
    model: str,
    bundle: Path,
    source: TextSource,
    options: TrainOptions,
    result: TrainResult,
    measured: dict[str, Any] | None,
) -> Record:
    from ..record import Record

    figures = measured or {}
    config = {"model": model, "start": bundle.name, "text": source.name, "text_sha256": source.sha256}
    return Record(kind, figures | {"history": result.history}, config | asdict(options))
