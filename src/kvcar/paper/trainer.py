"""One stage of training: steps, validation, keeping the best, checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import FitError
from ..fit.processes import average, average_gradients
from .checkpoint import TrainState, copy_of

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
        loss: loss of a step's windows, gradients accumulated by the callee: (windows, backward) -> mean loss.
        validate: validation loss as things stand.
        validate_every: steps between validations; one more comes before the first step and after the last.
        patience: validations without progress that end the stage, 0 for never.
        order: which of the seeds' orders of windows; stages of the same order see the same windows.
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


def window_order(count: int, seed: int, order: int, step: int, size: int) -> list[int]:
    """Windows of a step: shuffled epochs, a function of its arguments alone, so that a resumed run sees the same."""
    chosen: list[int] = []
    for place in range(step * size, (step + 1) * size):
        epoch, within = divmod(place, count)
        generator = torch.Generator().manual_seed(hash((seed, order, epoch)) % 2**62)
        chosen.append(int(torch.randperm(count, generator=generator)[within]))
    return chosen


def run_stage(
    stage: Stage,
    units: nn.Module,
    state: TrainState,
    optimizer: torch.optim.Optimizer,
    windows_of: Callable[[int], Sequence[int]],
    save: Callable[[], None],
    on_step: Callable[[dict[str, Any]], None],
) -> None:
    """Run a stage from ``state.step`` on; at its end ``units`` are the best that validation saw.

    Raises:
        FitError: the loss became NaN or infinite; the best state so far is back in ``units``.
    """
    if state.best is None:
        _note_validation(stage, units, state, on_step)
    while state.step < stage.steps:
        if stage.patience and state.stale >= stage.patience:
            break
        for group in optimizer.param_groups:
            group["lr"] = stage.learning_rate * schedule(state.step, stage.steps)
        optimizer.zero_grad()
        units.train()
        loss = average(stage.loss(windows_of(state.step)))
        units.eval()
        if not math.isfinite(loss):
            units.load_state_dict(state.best_tensors)
            raise FitError(f"training diverged in {stage.name} (loss {loss}); ask for a lower learning rate")
        average_gradients(stage.parameters)
        nn.utils.clip_grad_norm_(stage.parameters, _CLIP)
        optimizer.step()
        state.step += 1
        on_step({"stage": stage.name, "step": state.step, "loss": loss})
        if state.step % stage.validate_every == 0 or state.step == stage.steps:
            _note_validation(stage, units, state, on_step)
            save()
    units.load_state_dict(state.best_tensors)


def schedule(step: int, steps: int) -> float:
    """Share of the highest learning rate: a short rise, then half a cosine."""
    rise = max(1, round(steps * _WARM_UP))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def _note_validation(
    stage: Stage, units: nn.Module, state: TrainState, on_step: Callable[[dict[str, Any]], None]
) -> None:
    units.eval()
    with torch.no_grad():
        loss = stage.validate()
    on_step({"stage": stage.name, "step": state.step, "validation_loss": loss})
    if state.best is None or loss < state.best:
        state.best, state.stale, state.best_tensors = loss, 0, copy_of(units)
    else:
        state.stale += 1


def mean(values: Sequence[Tensor]) -> float:
    """Mean of scalars."""
    return float(torch.stack(list(values)).mean())
