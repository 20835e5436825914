"""Accounting of transformers' own caches, plain and quantised."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from transformers import Cache

from ..shapes import BFLOAT16_BYTES

# Where layers of transformers keep tokens; masks and sizes that they also keep as tensors are no part of the cache.
_HELD = ("keys", "values", "_quantized_keys", "_quantized_values")


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
