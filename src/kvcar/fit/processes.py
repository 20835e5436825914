"""Several processes that fit or train one set of codecs, started by ``accelerate launch``; one process otherwise."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError


@cache
def _state() -> Any:
    """The process group, made on first use; only where there is one, as a plain installation has no accelerate."""
    try:
        from accelerate import PartialState
    except ImportError:
        raise InputError("several processes fit or train with accelerate; install kvcar[train]") from None
    return PartialState(cpu=not torch.cuda.is_available())


def process_count() -> int:
    """Processes that work together: what a launcher says, or 1."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def process_index() -> int:
    """Place of this process among them."""
    return _state().process_index if process_count() > 1 else 0


def is_main_process() -> bool:
    """Whether this is the process that writes files and prints."""
    return process_index() == 0


def process_device() -> str:
    """Where this process computes, as torch names it."""
    return str(_state().device)


def _collective(name: str, value: Tensor, **options: str) -> Tensor:
    """Run one of accelerate's collective operations on a tensor; the result is where this process computes."""
    from accelerate import utils

    result = getattr(utils, name)(value.to(_state().device), **options)
    assert isinstance(result, Tensor)
    return result


def share(windows: Sequence[int]) -> Sequence[int]:
    """The part of a step's windows.

    Raises:
        InputError: they cannot be shared evenly, so that the mean of means would not be the mean.
    """
    count = process_count()
    if len(windows) % count:
        raise InputError(f"{len(windows)} windows per step cannot be shared evenly by {count} processes")
    size = len(windows) // count
    return windows[process_index() * size :][:size]


def own_share(windows: Tensor) -> Tensor:
    """Every so many-th of all windows: the part of the process that asks.

    Raises:
        InputError: there are fewer windows than processes.
    """
    count = process_count()
    if len(windows) < count:
        raise InputError(f"{len(windows)} windows are fewer than {count} processes; give more text or fewer processes")
    return windows[process_index() :: count]


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by its mean over all processes."""
    if process_count() == 1:
        return
    given = [p.grad for p in parameters if p.grad is not None]
    mean = _collective("reduce", torch.cat([g.flatten() for g in given]), reduction="mean")
    for gradient, part in zip(given, mean.split([g.numel() for g in given]), strict=True):
        gradient.copy_(part.view_as(gradient))


def average(value: float) -> float:
    """Mean of a number over all processes, so that all decide alike."""
    return value if process_count() == 1 else float(_collective("reduce", torch.tensor(value), reduction="mean"))


def total(value: Tensor) -> Tensor:
    """Sum of a tensor over all processes, on the CPU."""
    return value if process_count() == 1 else _collective("reduce", value, reduction="sum").cpu()


def from_first(value: Tensor) -> Tensor:
    """The first process' tensor, on the CPU."""
    return value if process_count() == 1 else _collective("broadcast", value.clone()).cpu()


def joined_rows(rows: Tensor) -> Tensor:
    """Rows ``[N, ...]`` of all processes after each other, on the CPU; ``N`` may differ between them."""
    if process_count() == 1:
        return rows
    counts = _collective("gather", torch.tensor([len(rows)])).tolist()
    padded = torch.cat([rows, rows.new_zeros(max(counts) - len(rows), *rows.shape[1:])])
    parts = _collective("gather", padded).cpu().split(max(counts))
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
