"""A cache that reads what a rival method would give back, stepped like any other.

It holds every token in the model's dtype. Tokens that have left the window by the end of a pass are replaced, for all
layers at once and before the next pass reads them, by what is decoded from their codes; the codes themselves are
counted and let go.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from kvcar.errors import InputError
from kvcar.evaluate.memory import kept_bytes
from kvcar.geometry import BFLOAT16_BYTES, KINDS, Kind, KVGeometry
from kvcar.kernels.rotary import RotaryTable

from .base import Method


class BaselineCache(Cache):
    """A cache of one sequence that codes as ``method`` says.

    Args:
        method: what codes.
        geometry: of the model; layers that attend to a sliding window stay exact.
        rotary: how each layer rotates its keys, for methods that code keys before RoPE.
    """

    def __init__(self, method: Method, geometry: KVGeometry, rotary: Mapping[int, RotaryTable]) -> None:
        self._method, self._geometry, self._rotary = method, geometry, rotary
        self._coded: dict[Kind, int] = dict.fromkeys(KINDS, 0)
        self._code_bits = 0
        self._full = [DynamicLayer() for _ in geometry.codable_layers]
        self._sliding = [DynamicSlidingWindowLayer(geometry.sliding_window) for _ in geometry.sliding_layers]
        by_layer = dict(zip(geometry.codable_layers, self._full, strict=True))
        by_layer |= dict(zip(geometry.sliding_layers, self._sliding, strict=True))
        super().__init__(layers=[by_layer[layer] for layer in range(geometry.layers)])

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Take the keys and values ``[1, H, T, D]`` of a pass; see ``transformers.Cache``.

        Raises:
            InputError: more than one sequence.
        """
        if key_states.shape[0] != 1:
            raise InputError(f"a baseline's cache holds one sequence, got a batch of {key_states.shape[0]}")
        if layer_idx == 0:
            self._code_what_left()
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def stored_bytes(self) -> int:
        """Bytes that the method would store for the tokens seen: codes, and what stays exact as bfloat16."""
        self._code_what_left()
        seen = self._full[0].get_seq_length()
        elements = len(self._full) * self._geometry.kv_heads * self._geometry.head_dim
        exact = sum(self._method.places[kind].exact(seen) for kind in KINDS) * elements * BFLOAT16_BYTES
        return exact + -(-self._code_bits // 8) + kept_bytes(Cache(layers=list(self._sliding)))

    @torch.no_grad()
    def _code_what_left(self) -> None:
        seen = self._full[0].get_seq_length()
        for kind in KINDS:
            places, start = self._method.places[kind], self._coded[kind]
            until = places.coded_until(seen)
            first = max(start, places.sinks)
            if first < until:
                self._code(kind, first, until)
            self._coded[kind] = max(start, until)

    def _code(self, kind: Kind, first: int, until: int) -> None:
        """Replace tokens ``first`` to ``until`` by what is decoded from their codes."""
        sides = self._sides(kind)
        unrotate = kind == "key" and self._method.keys_before_rope and self._rotary
        positions = torch.arange(first, until, device=sides[0].device)[None]
        tables = [self._rotary[layer] for layer in self._geometry.codable_layers] if unrotate else []
        x = [side[:, :, first:until].float() for side in sides]
        if tables:
            x = [table.unrotate(each, positions) for table, each in zip(tables, x, strict=True)]
        stored = self._method.encode(kind, torch.cat(x))
        self._code_bits += self._method.stored_bits(stored)
        decoded = list(self._method.decode(kind, stored).split(1))
        if tables:
            decoded = [table.rotate(each, positions) for table, each in zip(tables, decoded, strict=True)]
        for side, each in zip(sides, decoded, strict=True):
            side[:, :, first:until] = each.to(side.dtype)

    def _sides(self, kind: Kind) -> list[Tensor]:
        """Keys or values ``[1, H, T, D]`` of every layer that attends to the whole past; writing to them is kept."""
        sides = [layer.keys if kind == "key" else layer.values for layer in self._full]
        return [side for side in sides if side is not None]
