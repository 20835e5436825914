"""The paper's Algorithm 1: each layer's codecs alone (a), then all together (b).

Source: KV-CAR (arXiv 2512.06727). Stage (a) runs only the layers from the one in training on: what reaches it does not
change, so it is computed once and carried upwards layer by layer. Gradients flow no further down than its codecs.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..bundle import Bundle, CodedBlock
from ..errors import InputError
from ..fit.text import TextSource
from ..progress import OnProgress, silent
from .checkpoint import TrainState, load_checkpoint, remove_checkpoint, restore_optimizer, save_checkpoint
from .layers import LayerStack
from .losses import cross_entropy, kl_divergence
from .options import TrainOptions
from .processes import share, state as processes
from .simulate import Simulator
from .trainer import Stage, mean, run_stage, window_order
from .units import Unit, random_units, units_of

OnStep = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class TrainResult:
    """A trained bundle and how training went.

    Attributes:
        bundle: the same plan with trained codecs.
        history: an entry for each step (``loss``) and each validation (``validation_loss``), by ``stage`` and ``step``.
    """

    bundle: Bundle
    history: list[dict[str, Any]]


def train_bundle(
    model: PreTrainedModel,
    bundle: Bundle,
    windows: Tensor,
    source: TextSource,
    options: TrainOptions | None = None,
    checkpoint: Path | None = None,
    resume: bool = False,
    on_progress: OnProgress = silent,
    on_step: OnStep = lambda told: None,
) -> TrainResult:
    """Train a bundle's codecs inside the model; its weights do not change.

    Args:
        model: the model that the bundle was fitted for, with sdpa attention.
        bundle: what to start from; blocks lie within a layer.
        windows: token ids int64 ``[N, context]``; the last ones are held back for validation.
        source: where they come from, for provenance.
        options: see ``TrainOptions``.
        checkpoint: folder to keep the state in, so that a killed run can go on.
        resume: go on from what ``checkpoint`` holds.
        on_progress, on_step: told what is going on.

    Raises:
        InputError: options, text or a checkpoint that do not fit.
        ModelMismatchError: the bundle belongs to another model.
        FitError: training diverged.
    """
    options = options or TrainOptions()
    bundle.check_model(model)
    run = _Run(model, bundle, windows, options, on_progress, on_step)
    frozen = [p for p in model.parameters() if p.requires_grad]
    was_training = model.training
    model.eval().requires_grad_(False)
    try:
        with run.simulator:
            run.go(checkpoint, resume)
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
        model.train(was_training)
    if checkpoint is not None and processes().is_main_process:
        remove_checkpoint(checkpoint)
    return TrainResult(_with_units(bundle, run.units, source, windows, options), run.state.history)


class _Run:
    def __init__(
        self,
        model: PreTrainedModel,
        bundle: Bundle,
        windows: Tensor,
        options: TrainOptions,
        on_progress: OnProgress,
        on_step: OnStep,
    ) -> None:
        if windows.ndim != 2 or len(windows) <= options.validation_windows:
            raise InputError(
                f"training needs more windows than the {options.validation_windows} held back, got {len(windows)}; "
                "give more text, or a shorter context"
            )
        self.model, self.options, self._on_progress = model, options, on_progress
        device = next(model.parameters()).device
        self.held = windows[-options.validation_windows :].to(device)
        self.train = windows[: -options.validation_windows].to(device)
        self._on_step = on_step
        if options.start == "bundle":
            self.units = units_of(bundle, device)
        else:
            self.units = random_units(model, bundle.plan, self.train, options.seed, device)
        self.simulator = Simulator(model, bundle.plan, self.units, options.step_tokens)
        self.stack = LayerStack(model, bundle.plan.geometry.layers)
        self._layer_units: dict[int, list[Unit]] = {}
        for index, unit in self.units.items():
            assert isinstance(unit, Unit)
            self._layer_units.setdefault(bundle.plan.blocks[int(index)].slots[0].layer, []).append(unit)
        self.layers = sorted(self._layer_units) if options.layer_steps else []
        self.state = TrainState()
        self._told = {
            "options": options.as_dict(), "windows": _digest(windows.cpu()), "fingerprint": bundle.model.fingerprint,
            "plan": hashlib.sha256(bundle.plan.to_json().encode()).hexdigest(),
            "start": _digest(*(t for b in bundle.blocks for t in b.tensors().values())),
        }  # fmt: skip

    def go(self, checkpoint: Path | None, resume: bool) -> None:
        """All stages, from the first or from where a checkpoint stands."""
        moments = None
        if resume:
            if checkpoint is None:
                raise InputError("to resume, say where the checkpoint is")
            self.state, moments = load_checkpoint(checkpoint, self._told, self.units)
        self._finals = self._final_hidden()
        # The layer-wise prefix is carried upwards: (layer, what reaches it in every window, held-back ones last).
        self._prefix: tuple[int, list[Tensor]] | None = None
        for index in range(self.state.stage, len(self.layers) + 1):
            joint = index == len(self.layers)
            stage = self._joint_stage() if joint else self._layer_stage(self.layers[index])
            if stage.steps:
                self._run(index, stage, checkpoint, moments)
            moments = None
            self.state.stage, self.state.step, self.state.best, self.state.stale = index + 1, 0, None, 0
            self.state.best_tensors = {}

    def _run(self, index: int, stage: Stage, checkpoint: Path | None, moments: dict[str, Tensor] | None) -> None:
        optimizer = torch.optim.Adam(stage.parameters, lr=stage.learning_rate)
        if moments is not None:
            restore_optimizer(optimizer, moments)
        options = self.options

        def save() -> None:
            if checkpoint is not None and processes().is_main_process:
                save_checkpoint(checkpoint, self._told, self.state, self.units, optimizer)

        def tell(entry: dict[str, Any]) -> None:
            self.state.history.append(entry)
            self._on_step(entry)
            self._on_progress(f"train {stage.name}", self.state.step, stage.steps)

        def windows_of(step: int) -> Sequence[int]:
            return window_order(len(self.train), options.seed, index, step, options.windows_per_step)

        run_stage(stage, self.units, self.state, optimizer, windows_of, save, tell)

    # The two stages

    def _layer_stage(self, layer: int) -> Stage:
        prefix = self._advance(layer)
        held = prefix[len(self.train) :]

        def loss(windows: Sequence[int]) -> float:
            hidden = [prefix[i] for i in windows]
            return self._accumulate(windows, lambda some: self._logits(some, layer, hidden, windows))

        def validate() -> float:
            return self._validation([self._from(layer, h, w[None]) for h, w in zip(held, self.held, strict=True)])

        parameters = [p for unit in self._layer_units[layer] for p in unit.parameters()]
        steps, rate = self.options.layer_steps, self.options.layer_learning_rate
        return Stage(f"layer {layer}", steps, rate, parameters, loss, validate, max(1, steps))

    def _joint_stage(self) -> Stage:
        def loss(windows: Sequence[int]) -> float:
            return self._accumulate(windows, lambda some: self._compressed(self.train[list(some)]))

        def validate() -> float:
            return self._validation([self._compressed(w[None]) for w in self.held])

        parameters: list[nn.Parameter] = []
        for unit in self.units.values():
            assert isinstance(unit, Unit)
            if self.options.joint_trains in ("encoders", "all"):
                parameters += unit.codec.encoder_parameters()
            if self.options.joint_trains in ("decoders", "all"):
                parameters += unit.codec.decoder_parameters()
        o = self.options
        return Stage(
            "all layers", o.joint_steps, o.learning_rate, parameters, loss, validate, o.validate_every, o.patience
        )

    # Passes

    def _compressed(self, ids: Tensor) -> Tensor:
        with self._precision(), self.simulator.compressing():
            logits = self.simulator.logits(ids)
            self._distances = self.simulator.distances
        return logits

    def _from(self, layer: int, hidden: Tensor, ids: Tensor) -> Tensor:
        """Logits with one layer compressed, from what reaches it."""
        with self._precision(), self.simulator.compressing((layer,)), self.stack.starting_at(layer, hidden):
            logits = self.simulator.logits(ids)
            self._distances = self.simulator.distances
        return logits

    def _logits(self, some: Sequence[int], layer: int, hidden: list[Tensor], windows: Sequence[int]) -> Tensor:
        stacked = torch.cat([hidden[list(windows).index(i)] for i in some])
        return self._from(layer, stacked, self.train[list(some)])

    def _accumulate(self, windows: Sequence[int], logits_of: Callable[[Sequence[int]], Tensor]) -> float:
        """Gradients of the mean loss over this process' share of the windows, in several passes if asked to."""
        own = share(windows)
        passes = min(self.options.accumulation, len(own))
        size = -(-len(own) // passes)
        total = 0.0
        for first in range(0, len(own), size):
            some = own[first : first + size]
            logits = logits_of(some)
            loss = self._objective(logits, self.train[list(some)], [self._finals[i] for i in some])
            loss = loss + self.options.l1_weight * torch.stack(self._distances).sum()
            (loss * len(some) / len(own)).backward()
            total += loss.item() * len(some) / len(own)
        return total

    def _validation(self, logits: Sequence[Tensor]) -> float:
        finals = self._finals[len(self.train) :]
        losses = [
            self._objective(each, ids[None], [final])
            for each, ids, final in zip(logits, self.held, finals, strict=True)
        ]
        return mean(losses)

    def _objective(self, logits: Tensor, ids: Tensor, finals: Sequence[Tensor]) -> Tensor:
        if self.options.objective == "ce":
            return cross_entropy(logits, ids)
        return kl_divergence(logits, self._teacher(ids, torch.cat(list(finals))))

    @torch.no_grad()
    def _teacher(self, ids: Tensor, final: Tensor) -> Tensor:
        """Full-cache logits from what leaves the last layer."""
        with self._precision(), self.simulator.compressing(()), self.stack.starting_at(len(self.stack), final):
            return self.simulator.logits(ids)

    def _final_hidden(self) -> list[Tensor]:
        """What leaves the last layer in every window, with the full cache."""
        finals = []
        everything = torch.cat([self.train, self.held])
        for index, ids in enumerate(everything):
            with self._precision(), self.simulator.compressing(()):
                finals.append(self.stack.hidden(ids[None], len(self.stack)))
            self._on_progress("full-cache pass", index + 1, len(everything))
        return finals

    def _advance(self, layer: int) -> list[Tensor]:
        """What reaches ``layer`` in every window, from what reached the last layer that was asked for."""
        if layer == 0:
            # Nothing is skipped below the first layer.
            return [torch.empty(1, 0)] * (len(self.train) + len(self.held))
        reached = []
        for index, ids in enumerate(torch.cat([self.train, self.held])):
            start = None if self._prefix is None else (self._prefix[0], self._prefix[1][index])
            with self._precision(), self.simulator.compressing(()):
                reached.append(self.stack.hidden(ids[None], layer, start))
        self._prefix = (layer, reached)
        return reached

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        if self.options.mixed_precision == "no":
            return contextlib.nullcontext()
        return torch.autocast(self.held.device.type, dtype=torch.bfloat16)


def _with_units(
    bundle: Bundle, units: nn.ModuleDict, source: TextSource, windows: Tensor, options: TrainOptions
) -> Bundle:
    blocks = list(bundle.blocks)
    for index, unit in units.items():
        assert isinstance(unit, Unit)
        blocks[int(index)] = CodedBlock(unit.cpu().codec.freeze(), blocks[int(index)].quantizer)
    told: dict[str, Any] = {f"train_{name}": value for name, value in options.as_dict().items()}
    told |= {"train_text": source.name, "train_text_sha256": source.sha256, "train_tokens": windows.numel()}
    told["train_context"] = windows.shape[1]
    fit = bundle.fit.model_copy(update={"options": {**bundle.fit.options, **told}})
    return replace(bundle, blocks=tuple(blocks), fit=fit)


def _digest(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
