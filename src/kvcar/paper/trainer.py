"""What every way of training shares: the full-cache model as teacher, stages of steps, validation, checkpoints."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..bundle import Bundle
from ..errors import FitError, InputError
from ..fit.losses import cross_entropy, kl_divergence
from ..fit.processes import average, average_gradients, is_main_process, share
from ..progress import OnProgress
from .checkpoint import TrainState, copy_of, load_checkpoint, remove_checkpoint, restore_optimizer, save_checkpoint
from .options import OnStep, TrainOptions
from .simulate import LayerStack, Simulator, Units

_CLIP = 1.0
_WARM_UP = 0.05


@dataclass(frozen=True)
class Stage:
    """What one stage trains and how.

    Attributes:
        name: for progress and history.
        steps: optimiser steps.
        learning_rate: at its highest.
        parameters: what changes.
        loss: given a step's windows by number, accumulates the gradients of their mean loss and returns it.
        validate: computes the validation loss as things stand.
        validate_every: steps between validations; one more comes before the first step and after the last.
        patience: validations without progress that end the stage, 0 for never.
        order: which of the seed's orders of windows; stages of the same order see the same windows.
    """

    name: str
    steps: int
    learning_rate: float
    parameters: Sequence[nn.Parameter]
    loss: Callable[[Sequence[int]], float]
    validate: Callable[[], float]
    validate_every: int
    patience: int = 0
    order: int = 0


class Run:
    """One training run.

    Args:
        model: the model, in which everything runs.
        bundle: its plan says what is compressed.
        windows: token ids int64 ``[N, context]``; the last ones are held out for validation.
        options: see ``TrainOptions``.
        units: the plan's coded blocks in training form.
        trained: the module whose parameters the run changes, saves and restores.
        on_progress, on_step: called as it goes.

    Raises:
        ModelMismatchError: the bundle belongs to another model.
        InputError: too few windows.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        bundle: Bundle,
        windows: Tensor,
        options: TrainOptions,
        units: Units,
        trained: nn.Module,
        on_progress: OnProgress,
        on_step: OnStep,
    ) -> None:
        device = next(model.parameters()).device
        self.held_out = windows[-options.validation_windows :].to(device)
        self.train = windows[: -options.validation_windows].to(device)
        self.model, self.options, self.trained = model, options, trained
        self._on_progress, self._on_step = on_progress, on_step
        self.simulator = Simulator(model, bundle.plan, units, options.step_tokens)
        self.stack = LayerStack(model)
        self.state = TrainState()
        # By window, held-out ones last: what leaves the last layer with the full cache.
        self._finals: dict[int, Tensor] = {}
        self._identity = {
            "options": asdict(options), "windows": _digest(windows), "fingerprint": bundle.model.fingerprint,
            "plan": hashlib.sha256(bundle.plan.to_json().encode()).hexdigest(),
            "start": _digest(*(t for b in bundle.blocks for t in b.tensors().values())),
            "trained": sorted(name for name, _ in trained.named_parameters()),
        }  # fmt: skip

    def go(self, stages: Sequence[Callable[[], Stage]], checkpoint: Path | None, resume: bool) -> None:
        """Run all stages, each made when its turn comes, from the first or from where a checkpoint stands.

        Raises:
            FitError: the loss became NaN or infinite; the best state so far is back in ``trained``.
            InputError: a checkpoint that cannot be resumed.
        """
        frozen = [p for p in self.model.parameters() if p.requires_grad]
        was_training = self.model.training
        self.model.eval().requires_grad_(False)
        self.trained.requires_grad_(True)
        try:
            with self.simulator:
                self._go(stages, checkpoint, resume)
        finally:
            self.model.train(was_training)
            for parameter in frozen:
                parameter.requires_grad_(True)
        if checkpoint is not None and is_main_process():
            remove_checkpoint(checkpoint)

    def _go(self, stages: Sequence[Callable[[], Stage]], checkpoint: Path | None, resume: bool) -> None:
        if any(p is q for p in self.trained.parameters() for q in self.model.parameters()):
            self._compute_teacher()
        moments = None
        if resume:
            if checkpoint is None:
                raise InputError("to resume, say where the checkpoint is")
            self.state, moments = load_checkpoint(checkpoint, self._identity, self.trained)
        for index in range(self.state.stage, len(stages)):
            stage = stages[index]()
            if stage.steps:
                self._run(stage, checkpoint, moments)
            moments = None
            self.state = TrainState(stage=index + 1, history=self.state.history)

    # Steps

    def _run(self, stage: Stage, checkpoint: Path | None, moments: dict[str, Tensor] | None) -> None:
        """Run a stage from ``state.step`` on; at its end ``trained`` is the best that validation saw."""
        optimizer = torch.optim.Adam(stage.parameters, lr=stage.learning_rate)
        if moments is not None:
            restore_optimizer(optimizer, moments)
        state = self.state
        if state.best is None:
            self._validate(stage)
        while state.step < stage.steps and not (stage.patience and state.stale >= stage.patience):
            self._step(stage, optimizer)
            if state.step % stage.validate_every == 0 or state.step == stage.steps:
                self._validate(stage)
                if checkpoint is not None and is_main_process():
                    save_checkpoint(checkpoint, self._identity, state, self.trained, optimizer)
        self.trained.load_state_dict(state.best_tensors)

    def _step(self, stage: Stage, optimizer: torch.optim.Optimizer) -> None:
        options, state = self.options, self.state
        windows = _window_order(len(self.train), options.seed, stage.order, state.step, options.windows_per_step)
        for group in optimizer.param_groups:
            group["lr"] = stage.learning_rate * _schedule(state.step, stage.steps)
        optimizer.zero_grad()
        self.trained.train()
        loss = average(stage.loss(windows))
        self.trained.eval()
        if not math.isfinite(loss):
            self.trained.load_state_dict(state.best_tensors)
            raise FitError(f"training diverged in {stage.name} (loss {loss}); ask for a lower learning rate")
        average_gradients(stage.parameters)
        nn.utils.clip_grad_norm_(stage.parameters, _CLIP)
        optimizer.step()
        state.step += 1
        self._note(stage, {"loss": loss})

    def _validate(self, stage: Stage) -> None:
        state = self.state
        self.trained.eval()
        with torch.no_grad():
            loss = stage.validate()
        self._note(stage, {"validation_loss": loss})
        if state.best is None or loss < state.best:
            state.best, state.stale, state.best_tensors = loss, 0, copy_of(self.trained)
        else:
            state.stale += 1

    def _note(self, stage: Stage, figures: dict[str, float]) -> None:
        entry = {"stage": stage.name, "step": self.state.step, **figures}
        self.state.history.append(entry)
        self._on_step(entry)
        self._on_progress(f"train {stage.name}", self.state.step, stage.steps)

    # Passes and losses, for stages

    def whole_stage(self, name: str, parameters: Sequence[nn.Parameter], order: int = 0) -> Stage:
        """Make a stage that runs everything the plan codes compressed."""

        def loss(windows: Sequence[int]) -> float:
            return self.accumulate(windows, lambda some: self._compressed(self.train[list(some)]))

        def validate() -> float:
            return self.validation([self._compressed(ids[None]) for ids in self.held_out])

        o = self.options
        steps, rate, every = o.joint_steps, o.learning_rate, o.validate_every
        return Stage(name, steps, rate, parameters, loss, validate, every, o.patience, order)

    def _compressed(self, ids: Tensor) -> Tensor:
        with self.precision(), self.simulator.compressing():
            return self.simulator.logits(ids)

    def from_layer(self, layer: int, hidden: Tensor, ids: Tensor) -> Tensor:
        """Compute logits with one layer compressed, from what reaches it."""
        with self.precision(), self.simulator.compressing((layer,)), self.stack.starting_at(layer, hidden):
            return self.simulator.logits(ids)

    def accumulate(self, windows: Sequence[int], logits_of: Callable[[Sequence[int]], Tensor]) -> float:
        """Accumulate gradients of the mean loss over this process' share of the windows, in several passes if asked to."""
        own = share(windows)
        passes = min(self.options.accumulation, len(own))
        size = -(-len(own) // passes)
        total = 0.0
        for first in range(0, len(own), size):
            some = own[first : first + size]
            logits = logits_of(some)
            distances = self.simulator.distances  # of this pass; the teacher's has its own
            loss = self._objective(logits, some, self.train[list(some)])
            loss = loss + self.options.l1_weight * torch.stack(distances).sum()
            (loss * len(some) / len(own)).backward()
            total += loss.item() * len(some) / len(own)
        return total

    def validation(self, logits: Sequence[Tensor]) -> float:
        """Compute the mean loss of the held-out windows from their logits."""
        first = len(self.train)
        losses = [
            self._objective(each, [first + place], ids[None])
            for place, (each, ids) in enumerate(zip(logits, self.held_out, strict=True))
        ]
        return float(torch.stack(losses).mean())

    def _objective(self, logits: Tensor, places: Sequence[int], ids: Tensor) -> Tensor:
        """Mean loss of windows ``ids`` int64 ``[B, T]``, which stand at ``places``, held-out ones after all others."""
        if self.options.objective == "ce":
            return cross_entropy(logits, ids)
        finals = [self._final(place, window) for place, window in zip(places, ids, strict=True)]
        return kl_divergence(logits, self._teacher(ids, torch.cat(finals)))

    @torch.no_grad()
    def _teacher(self, ids: Tensor, final: Tensor) -> Tensor:
        """Full-cache logits from what leaves the last layer."""
        with self.precision(), self.simulator.compressing(()), self.stack.starting_at(len(self.stack), final):
            return self.simulator.logits(ids)

    def _final(self, index: int, ids: Tensor) -> Tensor:
        """What leaves the last layer in one window with the full cache, computed on first use."""
        if index not in self._finals:
            with self.precision(), self.simulator.compressing(()):
                self._finals[index] = self.stack.hidden(ids[None], len(self.stack))
        return self._finals[index]

    def _compute_teacher(self) -> None:
        """Compute everything that the teacher will be asked, while the weights are still its own."""
        everything = torch.cat([self.train, self.held_out])
        for index, ids in enumerate(everything):
            self._final(index, ids)
            self._on_progress("full-cache pass", index + 1, len(everything))

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """Let the model's own products run in the precision that was asked for."""
        if self.options.mixed_precision == "no":
            return contextlib.nullcontext()
        return torch.autocast(self.held_out.device.type, dtype=torch.bfloat16)


def _window_order(count: int, seed: int, order: int, step: int, size: int) -> list[int]:
    """Windows of a step: shuffled epochs, a function of its arguments alone, so that a resumed run sees the same."""
    chosen: list[int] = []
    for place in range(step * size, (step + 1) * size):
        epoch, within = divmod(place, count)
        generator = torch.Generator().manual_seed(hash((seed, order, epoch)) % 2**62)
        chosen.append(int(torch.randperm(count, generator=generator)[within]))
    return chosen


def _schedule(step: int, steps: int) -> float:
    """Share of the highest learning rate: a short rise, then half a cosine."""
    rise = max(1, round(steps * _WARM_UP))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def _digest(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
