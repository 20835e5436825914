"""Peak memory of a long run, measured in a process of its own.

A fresh interpreter loads the model, runs a short warm-up so that libraries have taken their working memory, notes its
resident size, prefills and decodes, and reports how far the peak rose.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedModel

from kvcar.cache.attach import PREFILL_CHUNK_TOKENS, attach
from kvcar.cache.cache import KVCarCache
from kvcar.errors import InputError
from kvcar.evaluate.memory import kept_elements
from kvcar.models.load import load_model
from kvcar.models.structure import cache_argument

_WARM_UP_TOKENS = 700
_IN_USE_ONLY = {"MALLOC_MMAP_THRESHOLD_": str(64 * 1024)}
"""glibc then maps what is larger on its own and gives it back when it is freed."""


@dataclass(frozen=True)
class MemoryRun:
    """Figures of one run.

    Attributes:
        tokens: tokens in the cache at the end.
        peak_growth_bytes: peak resident size less the resident size before the run.
        cache_bytes: bytes of the cache's tensors at the end.
    """

    tokens: int
    peak_growth_bytes: int
    cache_bytes: int


def measure_peak_growth(
    model: str,
    bundle: Path | None,
    tokens: int,
    decode_tokens: int = 16,
    dtype: str = "auto",
    in_use_only: bool = False,
) -> MemoryRun:
    """Run ``tokens`` tokens through a cache in a child process; ``bundle`` None uses the model's own full cache.

    What a warm-up has freed is given back first, so that all of the run's own transient memory counts as growth.

    With ``in_use_only`` tensors that are freed go back to the system at once: the peak is then that of memory in use, the same
    to a few percent from run to run. Without, it also holds what the allocator keeps between tensors of different sizes,
    as a user sees it: tens of MB, of which it is chance how many.

    Raises:
        InputError: the child failed, its last lines are in the message; or ``in_use_only`` without glibc.
    """
    if in_use_only and platform.libc_ver()[0] != "glibc":
        raise InputError(
            "memory in use can only be separated from what the allocator keeps with glibc; measure without in_use_only"
        )
    given = {
        "model": model,
        "bundle": str(bundle) if bundle else None,
        "tokens": tokens,
        "decode": decode_tokens,
        "dtype": dtype,
    }
    return MemoryRun(**run_child([__file__], given, _IN_USE_ONLY if in_use_only else {}))


def measure_chunk_transient(
    model: str, dtype: str = "auto", chunk: int = PREFILL_CHUNK_TOKENS, in_use_only: bool = False
) -> int:
    """Measure the bytes that the model needs for a prompt of one chunk besides weights and full cache, in a child process.

    Raises:
        InputError: as ``measure_peak_growth``.
    """
    run = measure_peak_growth(model, None, chunk, decode_tokens=0, dtype=dtype, in_use_only=in_use_only)
    return run.peak_growth_bytes - run.cache_bytes


def run_child(
    program: list[str], given: dict[str, Any], environment: Mapping[str, str] | None = None
) -> dict[str, int]:
    """Run a Python program with ``given`` as JSON and read the figures of its last line.

    Args:
        program: what follows the interpreter's name.
        given: its last argument.
        environment: what to add to this process' own.

    Raises:
        InputError: the child failed; its last lines are in the message.
    """
    command = [sys.executable, *program, json.dumps(given)]
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **(environment or {})}
    )
    if result.returncode:
        last = "\n".join(result.stderr.strip().splitlines()[-3:])
        raise InputError(f"the memory measurement failed:\n{last}")
    return json.loads(result.stdout.strip().splitlines()[-1])


def status_bytes(field: str) -> int:
    """Read a size from the kernel's account of this process, such as VmRSS (resident now) or VmHWM (its peak)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise InputError(f"this system does not report {field}; peak memory is measured on Linux only")


def forget_peak() -> None:
    """Set the kernel's peak to the present size, so that loading the model does not count."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        raise InputError(f"this system cannot reset a process' peak memory ({error.strerror}); Linux can") from None


def trim_heap() -> None:
    """Give freed memory back to the system, so that the resident size is what is in use; only glibc can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def resident_bytes() -> int:
    """Read the resident size of this process without what was freed."""
    trim_heap()
    return status_bytes("VmRSS")


@torch.no_grad()
def _run(model: PreTrainedModel, cache: Cache, tokens: int, decode_tokens: int) -> None:
    """Prefill in chunks, then decode, on token ids that repeat no short pattern."""
    ids = (torch.arange(tokens)[None] * 7919 + 13) % model.config.get_text_config().vocab_size
    prefill = tokens - decode_tokens
    for start in range(0, prefill, PREFILL_CHUNK_TOKENS):
        stop = min(start + PREFILL_CHUNK_TOKENS, prefill)
        model(input_ids=ids[:, start:stop], **cache_argument(model, cache), use_cache=True, logits_to_keep=1)
    for index in range(prefill, tokens):
        model(input_ids=ids[:, index : index + 1], **cache_argument(model, cache), use_cache=True, logits_to_keep=1)


def _child(given: dict[str, Any]) -> MemoryRun:
    loaded = load_model(str(given["model"]), dtype=str(given["dtype"]), device="cpu")
    attachment = attach(loaded.model, str(given["bundle"])) if given["bundle"] else None

    def new_cache() -> Cache:
        return attachment.new_cache() if attachment else DynamicCache(config=loaded.model.config)

    tokens, decode = int(given["tokens"] or 0), int(given["decode"] or 0)
    _run(loaded.model, new_cache(), min(_WARM_UP_TOKENS, tokens), min(2, decode))
    before = resident_bytes()
    forget_peak()
    cache = new_cache()
    _run(loaded.model, cache, tokens, decode)
    peak = status_bytes("VmHWM")
    held = cache.stored_bytes() if isinstance(cache, KVCarCache) else kept_elements(cache) * loaded.model.dtype.itemsize
    return MemoryRun(tokens, peak - before, held)


if __name__ == "__main__":
    print(json.dumps(asdict(_child(json.loads(sys.argv[1])))))
