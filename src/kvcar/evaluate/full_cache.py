"""Accounting of transformers' own caches."""

from __future__ import annotations

from transformers import Cache

from ..shapes import BFLOAT16_BYTES


def held_elements(cache: Cache) -> int:
    """Elements of all keys and values that a cache of transformers holds."""
    sides = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    return sum(side.numel() for side in sides if side is not None)


def bfloat16_bytes(cache: Cache) -> int:
    """Bytes that they take in bfloat16, whatever dtype the model runs in."""
    return held_elements(cache) * BFLOAT16_BYTES
