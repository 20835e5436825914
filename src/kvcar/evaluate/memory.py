"""Bytes that caches take: counted from their tensors, and a full cache that keeps bfloat16."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..geometry import BFLOAT16_BYTES

# Where layers of transformers keep tokens; masks and sizes that they also keep as tensors are no part of the cache.
_KEPT = ("keys", "values", "_quantized_keys", "_quantized_values")
# Little, because room that is not filled yet counts against the full cache that it is measured for.
_ROOM_STEP_TOKENS = 64


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
