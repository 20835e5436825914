"""Several processes that fit or train one set of codecs, started by ``accelerate launch``; one process otherwise."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, gather, reduce
from torch import Tensor, nn

from ..errors import InputError


@cache
def state() -> PartialState:
    """The process group, made on first use."""
    return PartialState(cpu=not torch.cuda.is_available())


def share(windows: Sequence[int]) -> Sequence[int]:
    """The part of a step's windows.

    Raises:
        InputError: they cannot be shared evenly, so that the mean of means would not be the mean.
    """
    count = state().num_processes
    if len(windows) % count:
        raise InputError(f"{len(windows)} windows per step cannot be shared evenly by {count} processes")
    size = len(windows) // count
    return windows[state().process_index * size :][:size]


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by its mean over all processes."""
    if state().num_processes == 1:
        return
    given = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in given])
    summed = reduce(flat, reduction="mean")
    assert isinstance(summed, torch.Tensor)
    for gradient, part in zip(given, summed.split([g.numel() for g in given]), strict=True):
        gradient.copy_(part.view_as(gradient))


def average(value: float) -> float:
    """Mean of a number over all processes, so that all decide alike."""
    if state().num_processes == 1:
        return value
    mean = reduce(torch.tensor(value, device=state().device), reduction="mean")
    assert isinstance(mean, torch.Tensor)
    return float(mean)


def total(value: Tensor) -> Tensor:
    """Sum of a tensor over all processes, on the CPU."""
    if state().num_processes == 1:
        return value
    summed = reduce(value.to(state().device), reduction="sum")
    assert isinstance(summed, Tensor)
    return summed.cpu()


def from_first(value: Tensor) -> Tensor:
    """The first process' tensor, on the CPU."""
    if state().num_processes == 1:
        return value
    sent = broadcast(value.to(state().device).clone())
    assert isinstance(sent, Tensor)
    return sent.cpu()


def joined_rows(rows: Tensor) -> Tensor:
    """Rows ``[N, ...]`` of all processes after each other, on the CPU; ``N`` may differ between them."""
    if state().num_processes == 1:
        return rows
    counts = gather(torch.tensor([len(rows)], device=state().device))
    assert isinstance(counts, Tensor)
    most = int(counts.max())
    padded = torch.cat([rows, rows.new_zeros(most - len(rows), *rows.shape[1:])]).to(state().device)
    parts = gather(padded)
    assert isinstance(parts, Tensor)
    return torch.cat([part[:count] for part, count in zip(parts.cpu().split(most), counts.tolist(), strict=True)])


def own_share(windows: Tensor) -> Tensor:
    """Every so many-th of all windows: the part of the process that asks.

    Raises:
        InputError: there are fewer windows than processes.
    """
    count = state().num_processes
    if len(windows) < count:
        raise InputError(f"{len(windows)} windows are fewer than {count} processes; give more text or fewer processes")
    return windows[state().process_index :: count]
