"""Partitions of a model's slots into blocks."""

from __future__ import annotations

from collections.abc import Container, Iterable

from ..errors import InputError
from ..geometry import KINDS, KVGeometry, Slot


def regular_blocks(geometry: KVGeometry, layers_per_block: int, heads_per_block: int | None) -> list[tuple[Slot, ...]]:
    """Blocks of neighbouring layers and heads, keys and values apart; the last ones may be smaller.

    Args:
        geometry: the cache to partition; sliding layers are in no block.
        layers_per_block: codable layers of a block.
        heads_per_block: KV heads of a block, None for all of a layer.

    Raises:
        InputError: a number is not positive, or larger than what the model has.
    """
    layers = geometry.codable_layers
    heads = geometry.kv_heads if heads_per_block is None else heads_per_block
    if not layers:
        raise InputError("every layer of this model attends to a sliding window; there is nothing to compress")
    if not 1 <= layers_per_block <= len(layers):
        raise InputError(f"layers per block must be 1 to {len(layers)} for this model, got {layers_per_block}")
    if not 1 <= heads <= geometry.kv_heads:
        raise InputError(f"heads per block must be 1 to {geometry.kv_heads} for this model, got {heads}")
    blocks = []
    for first in range(0, len(layers), layers_per_block):
        for kind in KINDS:
            for head in range(0, geometry.kv_heads, heads):
                members = range(head, min(head + heads, geometry.kv_heads))
                blocks.append(
                    tuple(Slot(layer, h, kind) for layer in layers[first : first + layers_per_block] for h in members)
                )
    return blocks


def without(blocks: Iterable[tuple[Slot, ...]], left_out: Container[Slot]) -> list[tuple[Slot, ...]]:
    """The blocks less some slots; blocks of which nothing is left are gone."""
    kept = [tuple(slot for slot in block if slot not in left_out) for block in blocks]
    return [block for block in kept if block]
