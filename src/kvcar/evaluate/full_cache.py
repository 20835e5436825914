"""Transformers' own caches, plain and quantised: their accounting, and a full one that holds bfloat16."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..geometry import BFLOAT16_BYTES

# Where layers of transformers keep tokens; masks and sizes that they also keep as tensors are no part of the cache.
_HELD = ("keys", "values", "_quantized_keys", "_quantized_values")
# Little, because room that is not filled yet counts against the full cache that it is measured for.
_ROOM_STEP_TOKENS = 64


def held_elements(cache: Cache) -> int:
    """Elements of all keys and values that a cache of transformers holds."""
    sides = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    return sum(side.numel() for side in sides if side is not None)


def bfloat16_bytes(cache: Cache) -> int:
    """Bytes that they take in bfloat16, whatever dtype the model runs in."""
    return held_elements(cache) * BFLOAT16_BYTES


def held_bytes(cache: Cache) -> int:
    """Bytes of every tensor in which a cache of transformers holds tokens, quantised or not.

    Packed codes count as they are. Whatever is floating point (keys, values, the residual, scales, zero points) counts
    as in a model that runs in bfloat16, as the full cache does.
    """
    return sum(_tensor_bytes(getattr(layer, name, None)) for layer in cache.layers for name in _HELD)


def _tensor_bytes(held: object) -> int:
    """Of a tensor, of the tensors inside a tensor subclass, or of all in a container."""
    if isinstance(held, Mapping):
        return sum(map(_tensor_bytes, held.values()))
    if isinstance(held, list | tuple):
        return sum(map(_tensor_bytes, held))
    if not isinstance(held, Tensor):
        return 0
    flatten = getattr(held, "__tensor_flatten__", None)
    if flatten is not None:
        return sum(_tensor_bytes(getattr(held, name)) for name in flatten()[0])
    if held.is_floating_point():
        return held.numel() * min(held.itemsize, BFLOAT16_BYTES)
    return held.nbytes


class Bfloat16Layer(DynamicLayer):
    """A full layer held in bfloat16, whatever dtype the model computes in.

    Attention gets a copy in the model's dtype, which is gone when the layer is done. ``keys`` and ``values`` are views
    ``[B, H, N, D]`` of buffers that grow in steps.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._buffers: dict[str, Tensor] = {}

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """As its base does, in bfloat16."""
        super().lazy_initialization(key_states, value_states)
        self.keys, self.values = _narrow(self.keys), _narrow(self.values)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add tokens ``[B, H, T, D]``; gives all of them in the dtype of these."""
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

    def _appended(self, side: str, held: Tensor | None, new: Tensor) -> Tensor:
        seen = 0 if held is None or held.numel() == 0 else held.shape[2]
        total = seen + new.shape[2]
        buffer = self._buffers.get(side)
        if buffer is None or not _begins(held, buffer) or buffer.shape[2] < total:
            room = -(-total // _ROOM_STEP_TOKENS) * _ROOM_STEP_TOKENS
            buffer = torch.empty(*new.shape[:2], room, new.shape[3], dtype=torch.bfloat16, device=new.device)
            if held is not None and seen:
                buffer[:, :, :seen] = held
            self._buffers[side] = buffer
        buffer[:, :, seen:total] = new
        return buffer[:, :, :total]


class Bfloat16SlidingLayer(DynamicSlidingWindowLayer):
    """A sliding layer that holds its window in bfloat16."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As its base does; what is kept is narrowed afterwards."""
        # Joining the kept window with wider tokens widens it for this pass alone.
        given = super().update(key_states, value_states, *args, **kwargs)
        self.keys, self.values = _narrow(self.keys), _narrow(self.values)
        return given


class Bfloat16Cache(DynamicCache):
    """Transformers' full cache, held in bfloat16 while a model computes in float32."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config=config)
        hold_in_bfloat16(self)


def hold_in_bfloat16(cache: Cache) -> None:
    """Let the full layers of an empty cache hold bfloat16; layers of other kinds stay as they are."""
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[index] = Bfloat16Layer()
        elif type(layer) is DynamicSlidingWindowLayer:
            cache.layers[index] = Bfloat16SlidingLayer(sliding_window=layer.sliding_window)


def _begins(held: Tensor | None, buffer: Tensor) -> bool:
    """Whether ``held`` is still a view of the buffer; picking sequences makes a tensor of its own of it."""
    return held is not None and held.data_ptr() == buffer.data_ptr() and len(held) == len(buffer)


def _narrow(held: Tensor | None) -> Tensor | None:
    # A copy, also of a narrow view: the wider tensor that it is a part of must not stay.
    return None if held is None else held.to(torch.bfloat16).contiguous()
