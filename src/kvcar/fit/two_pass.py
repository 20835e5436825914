"""Reading a cache after a prefill, in two passes: codes of clean keys and values, then a pass that attends over them.

Blocks may span layers here, since all keys and values exist before the first is read. Errors do not compound through what
is stored, as they do a little when a text is stepped through the cache; figures of this protocol choose and train, and are never
reported as the cost of a cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..geometry import KINDS, Kind, Slot
from ..models.attention_hook import AttentionHook
from ..plan import Plan
from .attention import compressed_attention, read_exactly

Code = Callable[[Tensor], Tensor]
"""Vectors of a block ``[N, W]`` -> what the cache gives back for them."""


@dataclass(frozen=True)
class Prefilled:
    """One window after its clean pass.

    Attributes:
        ids: int64 ``[1, T]``.
        logits: of the full cache, ``[1, T, V]``.
        vectors: (layer, kind) -> keys before RoPE or values, float32 ``[T, H * D]``.
    """

    ids: Tensor
    logits: Tensor
    vectors: Mapping[tuple[int, Kind], Tensor]


class TwoPass(AttentionHook):
    """Both passes over windows, one at a time; a context manager.

    Args:
        model: a causal language model using sdpa attention; restored at the end.
        plan: how slots are stored; its sinks stay exact.
        step_tokens: tokens fed at once, which see each other exactly.
        window: recent tokens read exactly, a multiple of ``step_tokens``.
    """

    def __init__(self, model: PreTrainedModel, plan: Plan, step_tokens: int, window: int) -> None:
        super().__init__(model, plan.geometry)
        self._plan, self._step_tokens, self._window = plan, step_tokens, window
        self._clean: dict[tuple[int, Kind], Tensor] | None = None
        self._decoded: dict[Slot, Tensor] = {}

    @torch.no_grad()
    def prefill(self, ids: Tensor) -> Prefilled:
        """The clean pass over a window int64 ``[T]``."""
        self._clean = {}
        try:
            given = ids[None].to(self.parts.device)
            logits = self.model(input_ids=given, use_cache=False).logits
            return Prefilled(given, logits, self._clean)
        finally:
            self._clean = None

    def read(self, prefilled: Prefilled, codes: Mapping[int, Code]) -> Tensor:
        """Logits ``[1, T, V]`` of the pass that attends over decoded vectors; gradients flow into ``codes``.

        Args:
            prefilled: see ``prefill``.
            codes: what is done to the vectors of each block of the plan; a block that is not there stays exact.
        """
        self._decoded = {}
        for index, code in codes.items():
            slots, x = self._plan.blocks[index].slots, self.block_vectors(prefilled, index)
            self._decoded |= zip(slots, code(x).split(self.geometry.head_dim, dim=-1), strict=True)
        for slot, source in self._plan.stored_source.items():
            if slot != source:
                decoded = self._decoded.get(source)
                self._decoded[slot] = self._vectors(prefilled, source) if decoded is None else decoded
        try:
            return self.model(input_ids=prefilled.ids, use_cache=False).logits
        finally:
            self._decoded = {}

    def block_vectors(self, prefilled: Prefilled, index: int) -> Tensor:
        """Clean vectors float32 ``[T, W]`` of a block of the plan."""
        return torch.cat([self._vectors(prefilled, slot) for slot in self._plan.blocks[index].slots], dim=-1)

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        softcap: float | None,
        sinks: Tensor | None = None,
    ) -> Tensor | None:
        """See ``AttentionHook``."""
        if self._clean is not None:
            if layer in self.geometry.codable_layers:
                for kind, side in zip(KINDS, (self.before_rope(layer, key), value), strict=True):
                    self._clean[layer, kind] = side[0].float().transpose(0, 1).flatten(1)
            return None
        keys, coded_keys = self._read_side(layer, "key", key)
        values, coded_values = self._read_side(layer, "value", value)
        if not (coded_keys or coded_values):
            return None
        exactly = read_exactly(key.shape[2], self._step_tokens, key.device, self._window)
        hidden = self.hidden(layer, key.shape[2], key.device)
        return compressed_attention(query, (key, value), (keys, values), exactly, scaling, softcap, sinks, hidden)

    def _read_side(self, layer: int, kind: Kind, exact: Tensor) -> tuple[Tensor, bool]:
        """Keys after RoPE or values ``[1, H, T, D]`` as read from pages, and whether any of them was coded."""
        slots = [Slot(layer, head, kind) for head in range(exact.shape[1])]
        if not any(slot in self._decoded for slot in slots):
            return exact, False
        own = self.before_rope(layer, exact) if kind == "key" else exact.float()
        side = torch.stack([self._decoded.get(s, own[0, s.head]) for s in slots])[None]
        if kind == "key":
            side = self.after_rope(layer, side)
        sinks = self._plan.sinks
        return torch.cat([exact[:, :, :sinks].float(), side[:, :, sinks:]], dim=2), True

    def _vectors(self, prefilled: Prefilled, slot: Slot) -> Tensor:
        dim = self.geometry.head_dim
        return prefilled.vectors[slot.layer, slot.kind][:, slot.head * dim : (slot.head + 1) * dim]
