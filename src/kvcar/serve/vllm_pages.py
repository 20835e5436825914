# pyright: reportMissingImports=false
"""Keys and values in and out of vLLM's own pages, whose layout is each attention backend's affair.

A backend writes tokens by itself. Where a block's elements lie is found by having it write a block of numbered ones, so
that no layout is assumed (on CPUs keys lie transposed or in tiles); a layout that does not give every element back is
refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedModelError

_DIGIT = 128  # numbers that every dtype of a cache holds exactly


class EnginePages:
    """The pages of all layers of a model.

    Args:
        layers: vLLM's attention layers in the model's order, caches given out.
        head_dim: of keys and values.

    Raises:
        UnsupportedModelError: a backend whose pages cannot be written or read token by token.
    """

    def __init__(self, layers: Sequence[Any], head_dim: int) -> None:
        self._layers, self._head_dim = list(layers), head_dim
        self._places: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}
        for layer in self._layers:
            self._places_of(layer)

    def read(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Keys after RoPE and values ``[L, H, T, D]`` of slots int64 ``[T]``."""
        sides = [self._read(layer, slots) for layer in self._layers]
        keys, values = (torch.stack(side) for side in zip(*sides, strict=True))
        return keys, values

    def write(self, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put keys after RoPE and values ``[L, H, T, D]`` at slots int64 ``[T]``."""
        for layer, key, value in zip(self._layers, keys, values, strict=True):
            device, dtype = layer.kv_cache.device, layer.kv_cache.dtype
            own = [side.transpose(0, 1).to(device, dtype).contiguous() for side in (key, value)]
            layer.impl.do_kv_cache_update(layer, *own, layer.kv_cache, slots.to(device))

    def _read(self, layer: Any, slots: Tensor) -> tuple[Tensor, Tensor]:
        cache = layer.kv_cache
        tokens = cache.shape[2]
        blocks = slots.to(cache.device) // tokens
        which, where = torch.unique_consecutive(blocks, return_inverse=True)
        rows = cache[which].flatten(1)
        offsets = slots.to(cache.device) % tokens
        places = self._places_of(layer)
        # [T, H, D] -> [H, T, D]
        keys, values = (rows[where[:, None, None], side[offsets]].transpose(0, 1) for side in places)
        return keys, values

    def _places_of(self, layer: Any) -> tuple[Tensor, Tensor]:
        """Where, in a flat block, the elements ``[tokens, H, D]`` of keys and of values lie."""
        key = (type(layer.impl), getattr(layer, "isa", None), tuple(layer.kv_cache.shape[1:]), layer.kv_cache.dtype)
        if key not in self._places:
            self._places[key] = _learned(layer, self._head_dim)
        return self._places[key]


def slots_of(blocks: Sequence[int], block_tokens: int) -> Tensor:
    """Slots int64 of all tokens of blocks, in order."""
    return (torch.tensor(blocks)[:, None] * block_tokens + torch.arange(block_tokens)).flatten()


def _learned(layer: Any, head_dim: int) -> tuple[Tensor, Tensor]:
    cache = layer.kv_cache
    if cache.ndim != 4 or cache.shape[3] != 2 * head_dim or not hasattr(layer.impl, "do_kv_cache_update"):
        raise UnsupportedModelError(
            f"pages of vLLM's {type(layer.impl).__name__} have shape {tuple(cache.shape)}; stored prefixes need [blocks, KV heads, "
            f"tokens, {2 * head_dim}] and a backend that writes them by itself: choose another --attention-backend"
        )
    heads, tokens = cache.shape[1:3]
    count = heads * tokens * head_dim
    numbers = torch.arange(1, 2 * count + 1).view(2, tokens, heads, head_dim)  # 0 stays for places never written
    found, scale = torch.zeros(2 * count, dtype=torch.int64), 1
    while scale <= 2 * count:
        digits = (numbers // scale % _DIGIT).to(cache.device, cache.dtype)
        scratch = torch.zeros_like(cache[:1])
        slots = torch.arange(tokens, device=cache.device)
        layer.impl.do_kv_cache_update(layer, digits[0].contiguous(), digits[1].contiguous(), scratch, slots)
        found += scratch.flatten().cpu().long() * scale
        scale *= _DIGIT
    places = torch.full((2 * count,), -1)
    right = (found >= 1) & (found <= 2 * count)
    places[found[right] - 1] = torch.arange(2 * count)[right]
    if not right.all() or (places < 0).any():
        raise UnsupportedModelError(
            f"vLLM's {type(layer.impl).__name__} keeps keys and values in a form that kvcar cannot read; choose another "
            "--attention-backend"
        )
    keys, values = places.view(2, tokens, heads, head_dim).to(cache.device).unbind(0)
    return keys, values
