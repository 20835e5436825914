"""The device that is timed: its name, its clock, its threads."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def processor_name() -> str:
    """Return the processor's name."""
    return _cpu_field("model name") or platform.processor() or platform.machine()


def _cpu_field(name: str) -> str:
    """Read a field of the first processor on Linux; nothing elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")


def use_threads(threads: int | None) -> None:
    """Compute with so many threads; None leaves torch's own choice."""
    if threads is not None:
        torch.set_num_threads(threads)


def device_config(device: torch.device) -> dict[str, Any]:
    """Describe the device for a record."""
    allowed = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{processor_name()}, {cpu_instructions()}"
    return {"device": name, "usable_cores": len(allowed(0)), "threads": torch.get_num_threads()}


def cpu_instructions() -> str:
    """Name the widest vectors that torch finds, such as AVX2, and whether bfloat16 is multiplied natively."""
    flags = f"{_cpu_field('flags')} {_cpu_field('Features')}".split()  # on x86, on ARM
    multiplies_bfloat16 = not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags)
    return torch.backends.cpu.get_cpu_capability() + (" with bfloat16" if multiplies_bfloat16 else "")


def now(device: torch.device) -> float:
    """Seconds on a clock, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Seconds that one call takes; on a GPU by its own events, so that launching is not counted twice."""
    if device.type != "cuda":
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    call()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1000
