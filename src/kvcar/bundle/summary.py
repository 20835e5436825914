"""A plan in numbers that a person can read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from ..geometry import BFLOAT16_BYTES, KINDS, Kind, KVGeometry, Slot
from ..layout import MeansLayout
from ..plan import Block, Plan


@dataclass(frozen=True)
class LayerBits:
    """Average stored bits per element of a layer; a block's bits are shared evenly among its slots."""

    layer: int
    key: float
    value: float


def bits_by_layer(plan: Plan, exact_bits: int = 8 * BFLOAT16_BYTES) -> list[LayerBits]:
    """Bits per element of every layer, exact slots and exact layers at ``exact_bits``, reused slots at 0."""
    per_slot = {slot: _slot_bits(plan, block, exact_bits) for block in plan.blocks for slot in block.slots}
    reused = {reuse.slot for reuse in plan.reuses}

    def average(layer: int, kind: Kind) -> float:
        slots = [Slot(layer, head, kind) for head in range(plan.geometry.kv_heads)]
        return sum(0.0 if s in reused else per_slot.get(s, float(exact_bits)) for s in slots) / len(slots)

    return [LayerBits(layer, *(average(layer, kind) for kind in KINDS)) for layer in range(plan.geometry.layers)]


def windows_in_words(geometry: KVGeometry) -> list[str]:
    """A line for layers whose window is short and exact, and one for those that are coded while their window lasts."""
    kind = f"{'chunks' if geometry.chunked else 'a sliding window'} of {geometry.sliding_window:,} tokens"
    exact, coded = len(geometry.sliding_layers), len(geometry.windowed_layers)
    lines = [f"{exact} of {geometry.layers} layers attend to {kind} and stay exact"] if exact else []
    return lines + (
        [f"{coded} of {geometry.layers} layers attend to {kind}; their pages are freed behind it"] if coded else []
    )


@dataclass(frozen=True)
class BlockSummary:
    """One row of the plan's table."""

    index: int
    codec: str
    kind: str
    layers: str
    heads: str
    width: int
    latents: int
    bits_per_element: float
    widths: str


def summarise_blocks(plan: Plan) -> list[BlockSummary]:
    """A row for every block."""
    return [_summarise(plan, index, block) for index, block in enumerate(plan.blocks)]


def _summarise(plan: Plan, index: int, block: Block) -> BlockSummary:
    width = len(block.slots) * plan.geometry.head_dim
    return BlockSummary(
        index=index,
        codec=block.codec,
        kind=block.kind or "key+value",
        layers=ranges(slot.layer for slot in block.slots),
        heads=ranges(slot.head for slot in block.slots),
        width=width,
        latents=width if block.lossless else block.latents,
        bits_per_element=_slot_bits(plan, block, 8 * BFLOAT16_BYTES),
        widths="lossless" if block.lossless else " ".join(f"{g.count}x{g.bits}" for g in block.groups),
    )


def ranges(numbers: Iterable[int]) -> str:
    """``0-4, 7`` for 0, 1, 2, 3, 4, 7."""
    ordered = sorted(Counter(numbers))
    parts: list[list[int]] = []
    for number in ordered:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)


def _slot_bits(plan: Plan, block: Block, exact_bits: int) -> float:
    if block.lossless:
        return float(exact_bits)
    width = len(block.slots) * plan.geometry.head_dim
    means = 8 * MeansLayout(0, width).size / plan.page_tokens if block.page_means else 0
    return (block.bits_per_token + means) / width
