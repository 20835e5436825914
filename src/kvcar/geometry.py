"""Axis names used in docstrings, the names of slots, and the geometry of a model's KV cache.

Axes: ``B`` batch, ``Hq`` query heads, ``H`` KV heads, ``T`` tokens of this forward pass, ``N`` tokens or pages,
``D`` head dim, ``W`` width of a block, ``R`` latents of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator

Kind = Literal["key", "value"]
KINDS: tuple[Kind, Kind] = ("key", "value")
Side = tuple[int, Kind]
"""Keys or values of one layer."""

BFLOAT16_BYTES = 2
"""Bytes an element takes in the full cache that every saving is quoted against."""


class StrictModel(BaseModel):
    """Base of everything kvcar writes to disk as JSON: frozen, strictly typed, unknown fields refused."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class Slot(NamedTuple):
    """One (layer, KV head, key-or-value): a head-dim-wide vector per token."""

    layer: int
    head: int
    kind: Kind

    def __str__(self) -> str:
        return f"{self.layer}.{self.head}.{self.kind}"


PositiveInt = Annotated[int, Field(ge=1)]

# Far beyond every model, and small enough that a file from a stranger cannot make slots of it that fill memory.
_LARGEST_HEADS = 1 << 17
_Layers = Annotated[int, Field(ge=1, le=4096)]
_Heads = Annotated[int, Field(ge=1, le=4096)]
_HeadDim = Annotated[int, Field(ge=1, le=65536)]
_Tokens = Annotated[int, Field(ge=1, le=2**31)]


class KVGeometry(StrictModel):
    """The shape of a model's KV cache, and which of its layers may be compressed.

    Attributes:
        layers: layers of the cache.
        kv_heads: key/value heads of a layer that may be compressed (``H``).
        query_heads: query heads of such a layer (``Hq``), a multiple of ``kv_heads``.
        head_dim: width of one head's key or value there (``D``).
        rotary: whether keys are rotated by position (RoPE) before they reach the cache.
        max_positions: positions the model was built for.
        sliding_layers: layers that attend to a window only and stay exact.
        windowed_layers: layers that attend to a window only and may be compressed; their pages are freed behind it.
        sliding_window: tokens that both attend to, 0 where there are none.
        chunked: whether windows do not slide but follow each other: a token attends to those of its own chunk of
            ``sliding_window`` tokens.
        own_layers: layers whose cache stays the model's own: states of a fixed size (linear attention, Mamba, convolutions), nothing
            (experts, or keys and values of another layer), and what kvcar cannot compress.
        layer_elements: key and value elements of every layer for one token, 0 where they do not grow with the text; empty where
            all layers are alike.
    """

    layers: _Layers
    kv_heads: _Heads
    query_heads: _Heads
    head_dim: _HeadDim
    rotary: bool
    max_positions: _Tokens
    sliding_layers: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(), strict=False, max_length=4096)
    windowed_layers: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(), strict=False, max_length=4096)
    sliding_window: Annotated[int, Field(ge=0, le=2**31)] = 0
    chunked: bool = False
    own_layers: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(), strict=False, max_length=4096)
    layer_elements: tuple[Annotated[int, Field(ge=0, le=2**31)], ...] = Field(default=(), strict=False, max_length=4096)

    @model_validator(mode="after")
    def _bounded(self) -> KVGeometry:
        if self.layers * self.kv_heads > _LARGEST_HEADS:
            raise ValueError(f"{self.layers} layers of {self.kv_heads} heads are beyond every model")
        named = (*self.sliding_layers, *self.windowed_layers, *self.own_layers)
        if len({layer for layer in named if layer < self.layers}) != len(named):
            raise ValueError(
                "sliding_layers, windowed_layers and own_layers name a layer twice, or one that the model does not have"
            )
        if self.windowed_layers and self.sliding_window < 1:
            raise ValueError("windowed_layers need a sliding_window of at least 1 token")
        if self.layer_elements and len(self.layer_elements) != self.layers:
            raise ValueError(f"layer_elements has {len(self.layer_elements)} numbers for {self.layers} layers")
        if any(self.elements_of(layer) != self.layer_elements_per_token for layer in self.codable_layers):
            raise ValueError("layer_elements of a layer that may be compressed is not what its heads make")
        return self

    @property
    def codable_layers(self) -> tuple[int, ...]:
        """Layers that may be compressed: those that attend to the whole past, and windowed ones."""
        other = {*self.sliding_layers, *self.own_layers}
        return tuple(layer for layer in range(self.layers) if layer not in other)

    @property
    def codable_groups(self) -> tuple[tuple[int, ...], ...]:
        """Layers that may be compressed by what they keep of the past, everything first: only those of a group share blocks."""
        windowed = set(self.windowed_layers)
        groups = (tuple(layer for layer in self.codable_layers if (layer in windowed) is own) for own in (False, True))
        return tuple(group for group in groups if group)

    def with_exact_windows(self) -> KVGeometry:
        """The geometry in which layers that attend to a window all stay exact, as bundles had it before these were compressed."""
        sliding = tuple(sorted((*self.sliding_layers, *self.windowed_layers)))
        return self.model_copy(update={"sliding_layers": sliding, "windowed_layers": (), "chunked": False})

    def kept_tokens(self, layer: int, tokens: int) -> int:
        """Tokens that a layer of the model's own cache keeps of ``tokens``; one with a window keeps that less one."""
        windowed = layer in self.sliding_layers or layer in self.windowed_layers
        return min(tokens, max(self.sliding_window - 1, 0)) if windowed else tokens

    @property
    def layer_elements_per_token(self) -> int:
        """Key and value elements of one layer that may be compressed, for one token."""
        return 2 * self.kv_heads * self.head_dim

    def elements_of(self, layer: int) -> int:
        """Key and value elements that a layer takes for one token, as long as it keeps it."""
        return self.layer_elements[layer] if self.layer_elements else self.layer_elements_per_token

    def kept_elements(self, layer: int, tokens: int) -> int:
        """Elements that a layer of the model's own cache keeps of ``tokens`` tokens; see ``kept_tokens``."""
        return self.kept_tokens(layer, tokens) * self.elements_of(layer)

    def full_bytes(self, tokens: int) -> int:
        """Bytes of the model's own cache in bfloat16 for one sequence; states of a fixed size are not counted."""
        return sum(self.kept_elements(layer, tokens) for layer in range(self.layers)) * BFLOAT16_BYTES

    def slots(self, kind: Kind | None = None) -> Iterator[Slot]:
        """All slots of the layers that may be compressed, layer by layer, keys before values."""
        kinds = KINDS if kind is None else (kind,)
        for layer in self.codable_layers:
            for each_kind in kinds:
                for head in range(self.kv_heads):
                    yield Slot(layer, head, each_kind)

    def __contains__(self, slot: object) -> bool:
        if not isinstance(slot, Slot) or slot.layer in self.sliding_layers or slot.layer in self.own_layers:
            return False
        return 0 <= slot.layer < self.layers and 0 <= slot.head < self.kv_heads
