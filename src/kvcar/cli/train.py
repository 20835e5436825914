"""``kvcar train`` and ``kvcar finetune``."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import Tensor

from ..bundle import Bundle, check_target
from ..errors import InputError
from ..evaluate.fidelity import fidelity_figures
from ..text import TextSource
from ..models.load import LoadedModel, load_model
from ..fit.processes import state as processes
from ..record import Record
from ..report.card import model_card
from ..paper.algorithm import TrainResult, train_bundle
from ..paper.finetune import finetune_weights
from ..paper.options import TrainOptions
from .app import app
from .arguments import BundlePath, Device, Dtype, Json, Model, Text
from .console import check_writable, out, progress_bars, step_teller
from .figures import fidelity_table
from .fit import check_bundle
from .texts import fit_and_check_text, up_to_windows

_CONTEXT, _TOKENS = 512, 24_576

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
ValidationWindows = Annotated[int | None, typer.Option(help="Last windows, held back for validation. Default: 2.")]
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
Check = Annotated[bool, typer.Option(help="Hold back a tenth of the text and measure the bundle on it.")]

_EXAMPLES = """Train a bundle's codecs inside MODEL: the paper's Algorithm 1, by default on KL divergence to the full cache.

[bold]Examples[/]

  kvcar fit demo -o start --codec autoencoder --key-latents 72 --value-latents 128 --latent-bits 16 --window 0

  kvcar train demo --bundle start -o trained --joint-steps 200 --text corpus.txt

  kvcar train demo --bundle start -o paper --paper

  kvcar train demo --bundle start -o trained --joint-steps 200 --text corpus.txt --resume

Several GPUs: accelerate launch -m kvcar train ... (torchrun on CPUs).
"""


@app.command(help=_EXAMPLES)
def train(
    model: Model,
    bundle: BundlePath,
    output: Output,
    text: Text = None,
    paper: Annotated[
        bool, typer.Option("--paper", help="The paper's recipe: random start, cross-entropy + L1, both stages.")
    ] = False,
    context: Context = _CONTEXT,
    tokens: Tokens = _TOKENS,
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
    check: Check = True,
    force: Force = False,
    json: Json = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Train a bundle; the examples in the help text say the rest."""
    options = _options(locals(), paper)
    first = Bundle.load(bundle)
    check_target(output, force)
    check_writable(json)
    source, held = fit_and_check_text(text, check)
    with progress_bars() as tell:
        loaded = load_model(model, dtype, _own_device(device), tell)
        windows = _windows(loaded, source, context, tokens)
        folder = checkpoint or output.with_name(output.name + ".training")
        result = train_bundle(loaded.model, first, windows, source, options, folder, resume, tell, step_teller())
        main = processes().is_main_process
        measured = check_bundle(loaded, result.bundle, [held], tell) if check and main and held is not None else None
    if not main:
        return
    result.bundle.save(output, model_card(result.bundle, measured), overwrite=force)
    _tell(output, result, measured)
    if json is not None:
        _record("train", model, bundle, source, options, result, measured).write(json)


_FINETUNE_EXAMPLES = """Tune MODEL's own attention weights to a bundle (the paper's Algorithm 2 after heads were chosen to be shared).

[bold]Examples[/]

  kvcar similarity demo -o shared --measure kl --count 20

  kvcar finetune demo --bundle shared -o shared-tuned --model-output demo-tuned --joint-steps 100
"""


@app.command(help=_FINETUNE_EXAMPLES)
def finetune(
    model: Model,
    bundle: BundlePath,
    output: Output,
    model_output: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the tuned model goes; must not exist.")],
    text: Text = None,
    tuned: Annotated[str, typer.Option(help="kv (key and value projections) or attention (all its weights).")] = "kv",
    context: Context = _CONTEXT,
    tokens: Tokens = _TOKENS,
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
    if tuned not in ("kv", "attention"):
        raise InputError(f"tuned must be kv or attention, got {tuned!r}")
    options = _options(locals(), paper=False)
    first = Bundle.load(bundle)
    check_target(output, force)
    check_writable(json)
    if model_output.exists():
        raise InputError(f"{model_output} exists; choose another folder for the tuned model")
    source, _ = fit_and_check_text(text, hold_back=False)
    with progress_bars() as tell:
        loaded = load_model(model, "float32", _own_device(device), tell)
        windows = _windows(loaded, source, context, tokens)
        folder = checkpoint or output.with_name(output.name + ".training")
        result = finetune_weights(
            loaded.model,
            first,
            windows,
            source,
            options,
            "kv" if tuned == "kv" else "attention",
            folder,
            resume,
            tell,
            step_teller(),
        )
    if not processes().is_main_process:
        return
    loaded.model.save_pretrained(model_output)
    loaded.tokenizer.save_pretrained(model_output)
    result.bundle.save(output, model_card(result.bundle, None), overwrite=force)
    out.print(f"wrote the tuned model to [bold]{model_output}[/]")
    _tell(output, result, None)
    if json is not None:
        _record("finetune", model, bundle, source, options, result, None).write(json)


def _options(given: dict[str, Any], paper: bool) -> TrainOptions:
    """Options from a command's arguments; those not given keep their defaults."""
    names = {field.name for field in fields(TrainOptions)}
    chosen = {name: value for name, value in given.items() if name in names and value is not None}
    return TrainOptions.paper(**chosen) if paper else TrainOptions(**chosen)


def _own_device(device: str) -> str:
    """The GPU of this process where several share the work."""
    several = processes().num_processes > 1
    return str(processes().device) if device == "auto" and several else device


def _windows(loaded: LoadedModel, source: TextSource, context: int, tokens: int) -> Tensor:
    context = min(context, loaded.model.config.get_text_config().max_position_embeddings, tokens)
    return up_to_windows(loaded.tokenizer, source.text, context, max(1, tokens // context))


def _tell(output: Path, result: TrainResult, measured: Any) -> None:
    last = result.history[-1]["stage"] if result.history else None
    losses = [e["validation_loss"] for e in result.history if "validation_loss" in e and e["stage"] == last]
    told = f"; validation loss {losses[0]:.4f} -> {min(losses):.4f} nats per token" if losses else ""
    out.print(f"wrote [bold]{output}[/]{told}")
    if measured is not None:
        out.print(fidelity_table({"held-back text": measured}))


def _record(
    kind: str, model: str, bundle: Path, source: TextSource, options: TrainOptions, result: TrainResult, measured: Any
) -> Record:
    figures = fidelity_figures(measured) if measured is not None else {}
    config = {"model": model, "start": bundle.name, "text": source.name, "text_sha256": source.sha256}
    return Record(kind, figures | {"history": result.history}, config | options.as_dict())
