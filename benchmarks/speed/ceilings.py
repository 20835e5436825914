"""What the device reaches at best: copying memory, and multiplying matrices. Other figures are shares of these."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import torch

from .device import seconds_of

_REPEATS = 7
_ENOUGH_SECONDS = 5.0


def copy_bytes_per_second(device: torch.device, mib: int = 256) -> float:
    """Bytes read and written per second by copying a tensor far larger than any cache."""
    source = torch.zeros(mib * 2**18, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _median_seconds(lambda: target.copy_(source), device)


def read_bytes_per_second(device: torch.device, mib: int = 256) -> float:
    """Bytes read per second by finding the largest number of a tensor far larger than any cache."""
    source = torch.zeros(mib * 2**18, device=device)
    return source.nbytes / _median_seconds(source.max, device)


def matmul_flop_per_second(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """Floating-point operations per second of a square product."""
    side = size or (8192 if device.type == "cuda" else 1024)
    a, b = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    return 2 * side**3 / _median_seconds(lambda: a @ b, device)


def _median_seconds(call: Callable[[], object], device: torch.device) -> float:
    """After a first call, of several; of few where each takes long, as emulated bfloat16 does."""
    call()
    seconds = [seconds_of(call, device)]
    while len(seconds) < _REPEATS and sum(seconds) < _ENOUGH_SECONDS:
        seconds.append(seconds_of(call, device))
    return median(seconds)
