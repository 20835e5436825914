"""Checkpoints: a killed run goes on to the same result. Tensors are safetensors, the rest JSON; nothing is unpickled."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ..errors import InputError
from ..files import reason_of, write_whole

_FILE = "training.safetensors"


@dataclass
class TrainState:
    """Where training stands.

    Attributes:
        stage, step: the next step to take, by the stage's place in the run.
        best: best validation loss of the stage so far; None before the first validation.
        stale: validations since.
        history: one entry per step or validation so far.
        best_tensors: the trained module as it was at its best.
    """

    stage: int = 0
    step: int = 0
    best: float | None = None
    stale: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    best_tensors: dict[str, Tensor] = field(default_factory=dict)


def save_checkpoint(
    folder: Path, run: dict[str, Any], state: TrainState, units: nn.Module, optimizer: torch.optim.Optimizer | None
) -> None:
    """Write everything into one file, whole or not at all.

    Args:
        folder: where to.
        run: identity of the run; a resumed one must have the same.
        state: see ``TrainState``.
        units: the module in training.
        optimizer: of the stage under way, None between stages.
    """
    tensors = {f"units.{name}": t for name, t in units.state_dict().items()}
    tensors |= {f"best.{name}": t for name, t in state.best_tensors.items()}
    if optimizer is not None:
        for index, entry in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(t) for name, t in entry.items()}
    standing = {
        "run": run, "stage": state.stage, "step": state.step, "best": state.best, "stale": state.stale,
        "history": state.history, "optimizing": optimizer is not None,
    }  # fmt: skip
    data = save({n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}, {"state": json.dumps(standing)})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / _FILE, [data])
    except (OSError, ValueError) as error:
        raise InputError(f"cannot write a checkpoint to {folder}: {reason_of(error)}; choose another folder") from None


def load_checkpoint(folder: Path, run: dict[str, Any], units: nn.Module) -> tuple[TrainState, dict[str, Tensor] | None]:
    """Read a checkpoint into ``units``; returns the state and the optimizer's tensors, None between stages.

    Raises:
        InputError: there is none, it is damaged, or it belongs to another run.
    """
    path = folder / _FILE
    try:
        with safe_open(str(path), framework="pt") as file:
            standing = json.loads((file.metadata() or {})["state"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise InputError(f"{path} is no readable checkpoint ({error}); start without --resume") from None
    differing = sorted(k for k in run.keys() | standing["run"].keys() if run.get(k) != standing["run"].get(k))
    if differing:
        raise InputError(
            f"the checkpoint in {folder} belongs to another run: {', '.join(differing)} differ; give the same options, or "
            "start without --resume"
        )
    units.load_state_dict(_below(tensors, "units."))
    state = TrainState(
        standing["stage"],
        standing["step"],
        standing["best"],
        standing["stale"],
        standing["history"],
        _below(tensors, "best."),
    )
    return state, _below(tensors, "optimizer.") if standing["optimizing"] else None


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put the saved moments of every parameter back."""
    entries: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        entries.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})


def copy_of(units: nn.Module) -> dict[str, Tensor]:
    """Copy a module's tensors as they are now."""
    return {name: t.detach().cpu().clone() for name, t in units.state_dict().items()}


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def remove_checkpoint(folder: Path) -> None:
    """Delete the checkpoint of a finished run, and its folder if nothing else is in it."""
    (folder / _FILE).unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
