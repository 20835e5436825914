"""What every way of training shares: windows, the full-cache model as teacher, passes, losses, checkpoints."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..bundle import Bundle
from ..errors import InputError
from ..fit.processes import share
from ..fit.processes import state as processes
from ..progress import OnProgress
from .checkpoint import TrainState, load_checkpoint, remove_checkpoint, restore_optimizer, save_checkpoint
from .layers import LayerStack
from ..fit.losses import cross_entropy, kl_divergence
from .options import TrainOptions
from .simulate import Simulator, Units
from .trainer import Stage, mean, run_stage, window_order

OnStep = Callable[[dict[str, Any]], None]
"""Told of every step (``loss``) and every validation (``validation_loss``), with ``stage`` and ``step``."""


def told_nobody(entry: dict[str, Any]) -> None:
    """Listen to nothing."""
    del entry


class Run:
    """One training run.

    Args:
        model: the model, in which everything runs.
        bundle: its plan says what is compressed.
        windows: token ids int64 ``[N, context]``; the last ones are held back for validation.
        options: see ``TrainOptions``.
        units: the plan's coded blocks in training form.
        trained: the module whose parameters the run changes, saves and restores.
        on_progress, on_step: told what is going on.

    Raises:
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
        self.held = windows[-options.validation_windows :].to(device)
        self.train = windows[: -options.validation_windows].to(device)
        self.model, self.options, self.trained = model, options, trained
        self._on_progress, self._on_step = on_progress, on_step
        self.simulator = Simulator(model, bundle.plan, units, options.step_tokens)
        self.stack = LayerStack(model, bundle.plan.geometry.layers)
        self.state = TrainState()
        self._told = {
            "options": options.as_dict(), "windows": _digest(windows), "fingerprint": bundle.model.fingerprint,
            "plan": hashlib.sha256(bundle.plan.to_json().encode()).hexdigest(),
            "start": _digest(*(t for b in bundle.blocks for t in b.tensors().values())),
            "trained": sorted(name for name, _ in trained.named_parameters()),
        }  # fmt: skip

    def go(self, stages: Sequence[Callable[[], Stage]], checkpoint: Path | None, resume: bool) -> None:
        """All stages, each made when its turn comes, from the first or from where a checkpoint stands."""
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
        if checkpoint is not None and processes().is_main_process:
            remove_checkpoint(checkpoint)

    def _go(self, stages: Sequence[Callable[[], Stage]], checkpoint: Path | None, resume: bool) -> None:
        self._finals: dict[int, Tensor] = {}
        if any(p is q for p in self.trained.parameters() for q in self.model.parameters()):
            self._compute_teacher()
        moments = None
        if resume:
            if checkpoint is None:
                raise InputError("to resume, say where the checkpoint is")
            self.state, moments = load_checkpoint(checkpoint, self._told, self.trained)
        for index in range(self.state.stage, len(stages)):
            stage = stages[index]()
            if stage.steps:
                self._run(stage, checkpoint, moments)
            moments = None
            self.state.stage, self.state.step, self.state.best, self.state.stale = index + 1, 0, None, 0
            self.state.best_tensors = {}

    def _run(self, stage: Stage, checkpoint: Path | None, moments: dict[str, Tensor] | None) -> None:
        optimizer = torch.optim.Adam(stage.parameters, lr=stage.learning_rate)
        if moments is not None:
            restore_optimizer(optimizer, moments)
        options = self.options

        def save() -> None:
            if checkpoint is not None and processes().is_main_process:
                save_checkpoint(checkpoint, self._told, self.state, self.trained, optimizer)

        def tell(entry: dict[str, Any]) -> None:
            self.state.history.append(entry)
            self._on_step(entry)
            self._on_progress(f"train {stage.name}", self.state.step, stage.steps)

        def windows_of(step: int) -> Sequence[int]:
            return window_order(len(self.train), options.seed, stage.order, step, options.windows_per_step)

        run_stage(stage, self.trained, self.state, optimizer, windows_of, save, tell)

    # Passes and losses, for stages

    def compressed(self, ids: Tensor) -> Tensor:
        with self.precision(), self.simulator.compressing():
            logits = self.simulator.logits(ids)
            self._distances = self.simulator.distances
        return logits

    def from_layer(self, layer: int, hidden: Tensor, ids: Tensor) -> Tensor:
        """Logits with one layer compressed, from what reaches it."""
        with self.precision(), self.simulator.compressing((layer,)), self.stack.starting_at(layer, hidden):
            logits = self.simulator.logits(ids)
            self._distances = self.simulator.distances
        return logits

    def accumulate(self, windows: Sequence[int], logits_of: Callable[[Sequence[int]], Tensor]) -> float:
        """Gradients of the mean loss over this process' share of the windows, in several passes if asked to."""
        own = share(windows)
        passes = min(self.options.accumulation, len(own))
        size = -(-len(own) // passes)
        total = 0.0
        for first in range(0, len(own), size):
            some = own[first : first + size]
            logits = logits_of(some)
            loss = self._objective(logits, some, self.train[list(some)])
            loss = loss + self.options.l1_weight * torch.stack(self._distances).sum()
            (loss * len(some) / len(own)).backward()
            total += loss.item() * len(some) / len(own)
        return total

    def validation(self, logits: Sequence[Tensor]) -> float:
        first = len(self.train)
        losses = [
            self._objective(each, [first + place], ids[None])
            for place, (each, ids) in enumerate(zip(logits, self.held, strict=True))
        ]
        return mean(losses)

    def _objective(self, logits: Tensor, places: Sequence[int], ids: Tensor) -> Tensor:
        """Mean loss of windows ``ids`` int64 ``[B, T]``, which stand at ``places``, held-back ones after all others."""
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
        """Everything that the teacher will be asked, while the weights are still its own."""
        everything = torch.cat([self.train, self.held])
        for index, ids in enumerate(everything):
            self._final(index, ids)
            self._on_progress("full-cache pass", index + 1, len(everything))

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        if self.options.mixed_precision == "no":
            return contextlib.nullcontext()
        return torch.autocast(self.held.device.type, dtype=torch.bfloat16)


def check_windows(windows: Tensor, options: TrainOptions) -> None:
    """Raise InputError if nothing would be left to train on."""
    if windows.ndim != 2 or len(windows) <= options.validation_windows:
        raise InputError(
            f"training needs more windows than the {options.validation_windows} held back, got {len(windows)}; "
            "give more text, or a shorter context"
        )


def _digest(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
