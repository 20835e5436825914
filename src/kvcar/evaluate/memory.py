"""Peak memory of a long run, measured in a process of its own.

``measure_peak_growth`` starts a fresh interpreter that loads the model, runs a short warm-up so that libraries have
taken their working memory, notes its resident size, then prefills and decodes, and reports how far the peak rose.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedModel

from ..errors import InputError
from ..models.load import load_model
from ..cache.attach import attach
from ..cache.cache import KVCarCache
from ..cache.prefill import PREFILL_CHUNK_TOKENS
from .full_cache import Bfloat16Cache, bfloat16_bytes, held_elements, hold_in_bfloat16

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
            "memory in use can only be told from what the allocator keeps with glibc; measure without in_use_only"
        )
    given = {
        "model": model,
        "bundle": str(bundle) if bundle else None,
        "tokens": tokens,
        "decode": decode_tokens,
        "dtype": dtype,
    }
    return MemoryRun(**_in_child(given, _IN_USE_ONLY if in_use_only else {}))


def measure_chunk_transient(
    model: str, dtype: str = "auto", chunk: int = PREFILL_CHUNK_TOKENS, in_use_only: bool = False
) -> int:
    """Bytes that the model needs for a prompt of one chunk besides weights and full cache, in a child process.

    Raises:
        InputError: as ``measure_peak_growth``.
    """
    run = measure_peak_growth(model, None, chunk, decode_tokens=0, dtype=dtype, in_use_only=in_use_only)
    return run.peak_growth_bytes - run.cache_bytes


def fill_memory(
    model: str, bundle: Path | None, memory_bytes: int, batch: int, window: int | None = None, dtype: str = "bfloat16"
) -> dict[str, int]:
    """Feed ``batch`` sequences in a child process until its resident size has grown by ``memory_bytes``.

    Weights and codecs are loaded before, the model's transient memory is warmed up before, and what libraries have
    freed is given back before the size is read. ``bundle`` None uses the model's own full cache.

    ``dtype`` is what the model computes in. Caches hold bfloat16 either way, as the full cache that savings are quoted
    against: float32 is for processors that emulate bfloat16, where it is many times faster. (A plan whose exact dtype
    is the model's keeps float32 then.)

    Returns:
        ``tokens`` of each sequence that fitted, ``cache_bytes`` of the cache's tensors then, and
        ``resident_growth_bytes``; ``limited_by_positions`` is 1 where the model's positions ended it instead.

    Raises:
        InputError: the child failed; its last lines are in the message.
    """
    given = {
        "model": model,
        "bundle": str(bundle) if bundle else None,
        "memory": memory_bytes,
        "batch": batch,
        "window": window,
        "dtype": dtype,
    }
    return _in_child(given, {})


def _in_child(given: dict[str, Any], environment: dict[str, str]) -> dict[str, int]:
    command = [sys.executable, "-m", "kvcar.evaluate.memory", json.dumps(given)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)
    if result.returncode:
        last = "\n".join(result.stderr.strip().splitlines()[-3:])
        raise InputError(f"the memory measurement failed:\n{last}")
    return json.loads(result.stdout.strip().splitlines()[-1])


@torch.no_grad()
def _run(model: PreTrainedModel, cache: Cache, tokens: int, decode_tokens: int) -> None:
    """Prefill in chunks, then decode, on token ids that repeat no short pattern."""
    ids = (torch.arange(tokens)[None] * 7919 + 13) % model.config.get_text_config().vocab_size
    prefill = tokens - decode_tokens
    for start in range(0, prefill, PREFILL_CHUNK_TOKENS):
        stop = min(start + PREFILL_CHUNK_TOKENS, prefill)
        model(input_ids=ids[:, start:stop], past_key_values=cache, use_cache=True, logits_to_keep=1)
    for index in range(prefill, tokens):
        model(input_ids=ids[:, index : index + 1], past_key_values=cache, use_cache=True, logits_to_keep=1)


def status_bytes(field: str) -> int:
    """A size from the kernel's account of this process, such as VmRSS (resident now) or VmHWM (its peak)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise InputError(f"this system does not tell {field}; peak memory is measured on Linux only")


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
    """Resident size of this process without what was freed."""
    trim_heap()
    return status_bytes("VmRSS")


_FILL_CHUNK_TOKENS = 64


@torch.no_grad()
def _fill_child(given: dict[str, Any]) -> dict[str, int]:
    """Grow one cache until the resident size has grown by as much as is allowed."""
    loaded = load_model(str(given["model"]), dtype=str(given["dtype"]), device="cpu")
    attachment = attach(loaded.model, given["bundle"], given["window"]) if given["bundle"] else None
    batch, wide = int(given["batch"]), loaded.model.dtype == torch.float32
    text_config = loaded.model.config.get_text_config()
    vocabulary = text_config.vocab_size
    most = text_config.max_position_embeddings // _FILL_CHUNK_TOKENS * _FILL_CHUNK_TOKENS

    def new_cache() -> Cache:
        if attachment is None:
            return Bfloat16Cache(loaded.model.config) if wide else DynamicCache(config=loaded.model.config)
        cache = attachment.new_cache()
        if wide:
            hold_in_bfloat16(cache)  # its layers that are not coded
        return cache

    def step(cache: Cache) -> None:
        ids = (torch.arange(_FILL_CHUNK_TOKENS)[None] + 100 * torch.arange(batch)[:, None]) % vocabulary
        loaded.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

    warm = new_cache()
    for _ in range(8):
        step(warm)
    del warm
    before, cache, tokens, held, growth = resident_bytes(), new_cache(), 0, 0, 0
    while tokens < most:
        step(cache)
        grown = resident_bytes() - before
        if grown > int(given["memory"]):
            break
        tokens, growth = tokens + _FILL_CHUNK_TOKENS, grown
        held = cache.stored_bytes() if isinstance(cache, KVCarCache) else bfloat16_bytes(cache)
    return {
        "tokens": tokens, "cache_bytes": held, "resident_growth_bytes": growth, "limited_by_positions": int(tokens >= most)
    }  # fmt: skip


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
    held = cache.stored_bytes() if isinstance(cache, KVCarCache) else held_elements(cache) * loaded.model.dtype.itemsize
    return MemoryRun(tokens, peak - before, held)


if __name__ == "__main__":
    told = json.loads(sys.argv[1])
    print(json.dumps(_fill_child(told) if "memory" in told else asdict(_child(told))))
