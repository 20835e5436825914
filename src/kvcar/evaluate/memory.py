"""Bytes that caches take: counted from their tensors, and measured by filling memory in a process of its own."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..cache.attach import attach
from ..cache.cache import KVCarCache
from ..errors import InputError
from ..geometry import BFLOAT16_BYTES
from ..models.load import load_model

# Where layers of transformers keep tokens; masks and sizes that they also keep as tensors are no part of the cache.
_KEPT = ("keys", "values", "_quantized_keys", "_quantized_values")
# Little, because room that is not filled yet counts against the full cache that it is measured for.
_ROOM_STEP_TOKENS = 64
_FILL_CHUNK_TOKENS = 64


def kept_elements(cache: Cache) -> int:
    """Count elements of all keys and values in a cache of transformers."""
    sides = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    return sum(side.numel() for side in sides if side is not None)


def bfloat16_bytes(cache: Cache) -> int:
    """Count the bytes that they take in bfloat16, whatever dtype the model runs in."""
    return kept_elements(cache) * BFLOAT16_BYTES


def kept_bytes(cache: Cache) -> int:
    """Count the bytes of every tensor in which a cache of transformers keeps tokens, quantised or not.

    Packed codes count as they are. Whatever is floating point (keys, values, the residual, scales, zero points) counts
    as in a model that runs in bfloat16, as the full cache does.
    """
    return sum(_tensor_bytes(getattr(layer, name, None)) for layer in cache.layers for name in _KEPT)


def _tensor_bytes(kept: object) -> int:
    """Count those of a tensor, of the tensors inside a tensor subclass, or of all in a container."""
    if isinstance(kept, Mapping):
        return sum(map(_tensor_bytes, kept.values()))
    if isinstance(kept, list | tuple):
        return sum(map(_tensor_bytes, kept))
    if not isinstance(kept, Tensor):
        return 0
    flatten = getattr(kept, "__tensor_flatten__", None)
    if flatten is not None:
        return sum(_tensor_bytes(getattr(kept, name)) for name in flatten()[0])
    if kept.is_floating_point():
        return kept.numel() * min(kept.itemsize, BFLOAT16_BYTES)
    return kept.nbytes


class Bfloat16Layer(DynamicLayer):
    """A full layer in bfloat16, whatever dtype the model computes in.

    Attention gets a copy in the model's dtype, which is gone when the layer is done. ``keys`` and ``values`` are views
    ``[B, H, N, D]`` of buffers that grow in steps.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._buffers: dict[str, Tensor] = {}

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Begin as its base does, in bfloat16."""
        super().lazy_initialization(key_states, value_states)
        self.keys, self.values = _narrow(self.keys), _narrow(self.values)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add tokens ``[B, H, T, D]``; give all of them in the dtype of these."""
        del args, kwargs
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._appended("keys", self.keys, key_states)
        self.values = self._appended("values", self.values, value_states)
        return self.keys.to(key_states.dtype), self.values.to(value_states.dtype)

    def reset(self) -> None:
        """Forget all tokens, and give their memory back."""
        super().reset()
        self._buffers.clear()

    def _appended(self, name: str, side: Tensor | None, new: Tensor) -> Tensor:
        seen = 0 if side is None or side.numel() == 0 else side.shape[2]
        total = seen + new.shape[2]
        buffer = self._buffers.get(name)
        if buffer is None or not _begins(side, buffer) or buffer.shape[2] < total:
            room = -(-total // _ROOM_STEP_TOKENS) * _ROOM_STEP_TOKENS
            buffer = torch.empty(*new.shape[:2], room, new.shape[3], dtype=torch.bfloat16, device=new.device)
            if side is not None and seen:
                buffer[:, :, :seen] = side
            self._buffers[name] = buffer
        buffer[:, :, seen:total] = new
        return buffer[:, :, :total]


class Bfloat16SlidingLayer(DynamicSlidingWindowLayer):
    """A sliding layer that keeps its window in bfloat16."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add tokens as its base does; what is kept is narrowed afterwards."""
        # Joining the kept window with wider tokens widens it for this pass alone.
        given = super().update(key_states, value_states, *args, **kwargs)
        self.keys, self.values = _narrow(self.keys), _narrow(self.values)
        return given


class Bfloat16Cache(DynamicCache):
    """Transformers' full cache, in bfloat16 while a model computes in float32."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config=config)
        keep_in_bfloat16(self)


def keep_in_bfloat16(cache: Cache) -> None:
    """Let the full layers of an empty cache keep bfloat16; layers of other kinds stay as they are."""
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[index] = Bfloat16Layer()
        elif type(layer) is DynamicSlidingWindowLayer:
            cache.layers[index] = Bfloat16SlidingLayer(sliding_window=layer.sliding_window)


def _begins(side: Tensor | None, buffer: Tensor) -> bool:
    """Tell whether ``side`` is still a view of the buffer; picking sequences makes a tensor of its own of it."""
    return side is not None and side.data_ptr() == buffer.data_ptr() and len(side) == len(buffer)


def _narrow(side: Tensor | None) -> Tensor | None:
    # A copy, also of a narrow view: the wider tensor that it is a part of must not stay.
    return None if side is None else side.to(torch.bfloat16).contiguous()


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
    return run_child(["-m", "kvcar.evaluate.memory"], given)


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
def _fill_child(given: dict[str, Any]) -> dict[str, int]:
    """Grow one cache until the resident size has grown by as much as is allowed."""
    loaded = load_model(str(given["model"]), dtype=str(given["dtype"]), device="cpu")
    attachment = attach(loaded.model, given["bundle"], given["window"]) if given["bundle"] else None
    batch, wide = int(given["batch"]), loaded.model.dtype == torch.float32
    text_config = loaded.model.config.get_text_config()
    vocabulary = text_config.vocab_size
    positions = text_config.max_position_embeddings // _FILL_CHUNK_TOKENS * _FILL_CHUNK_TOKENS

    def new_cache() -> Cache:
        if attachment is None:
            return Bfloat16Cache(loaded.model.config) if wide else DynamicCache(config=loaded.model.config)
        cache = attachment.new_cache()
        if wide:
            keep_in_bfloat16(cache)  # its layers that are not coded
        return cache

    def step(cache: Cache) -> None:
        ids = (torch.arange(_FILL_CHUNK_TOKENS)[None] + 100 * torch.arange(batch)[:, None]) % vocabulary
        loaded.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

    warm = new_cache()
    for _ in range(8):
        step(warm)
    del warm
    before, cache, tokens, stored, growth = resident_bytes(), new_cache(), 0, 0, 0
    while tokens < positions:
        step(cache)
        grown = resident_bytes() - before
        if grown > int(given["memory"]):
            break
        tokens, growth = tokens + _FILL_CHUNK_TOKENS, grown
        stored = cache.stored_bytes() if isinstance(cache, KVCarCache) else bfloat16_bytes(cache)
    return {
        "tokens": tokens, "cache_bytes": stored, "resident_growth_bytes": growth, "limited_by_positions": int(tokens >= positions)
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(_fill_child(json.loads(sys.argv[1]))))
