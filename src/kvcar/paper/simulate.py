"""Running a model as if its cache were compressed: one pass over all tokens, differentiable.

Every layer's keys and values are coded and decoded as the layer computes them, so that errors compound through the
layers as they do when a text is stepped through the cache with window 0.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import InputError
from ..models.attention_hook import AttentionHook
from ..plan import Plan
from ..geometry import KINDS, Slot
from ..fit.attention import compressed_attention, read_exactly

Units = Mapping[str, Any] | nn.ModuleDict


class Simulator(AttentionHook):
    """Stands in for a compressed cache while codecs are trained or reuses are tried out; a context manager.

    Args:
        model: a causal language model using sdpa attention; restored at the end.
        plan: how slots are stored; blocks lie within a layer.
        units: the module that gives a block's reconstruction, by the block's index as a string.
        step_tokens: tokens of a step, which see each other exactly.

    Raises:
        InputError: a block spans layers, whose later layers do not exist yet when the first is read.
    """

    def __init__(self, model: PreTrainedModel, plan: Plan, units: Units, step_tokens: int = 1) -> None:
        for block in plan.blocks:
            if len({slot.layer for slot in block.slots}) > 1:
                raise InputError("training in one pass needs blocks within a layer; fit with --layers-per-block 1")
        super().__init__(model, plan.geometry)
        self.plan, self._units, self._step_tokens = plan, units, step_tokens
        self._active: frozenset[int] = frozenset(plan.coded_layers)
        self._blocks: dict[int, list[int]] = {}
        for index, block in enumerate(plan.blocks):
            self._blocks.setdefault(block.slots[0].layer, []).append(index)
        self._sources = {source for slot, source in plan.stored_source.items() if slot != source}
        self._stored: dict[Slot, Tensor] = {}
        self.distances: list[Tensor] = []

    @contextmanager
    def compressing(self, layers: Collection[int] | None = None) -> Iterator[None]:
        """Compress just ``layers`` (None: all that the plan codes) in the passes inside; ``()`` is the full cache."""
        before = self._active
        self._active = frozenset(self.plan.coded_layers if layers is None else layers)
        self._stored, self.distances = {}, []
        try:
            yield
        finally:
            self._active = before

    def logits(self, ids: Tensor) -> Tensor:
        """Logits ``[B, T, V]`` of windows int64 ``[B, T]``; afterwards ``distances`` holds each block's and each
        reuse's mean absolute error.
        """
        self._stored, self.distances = {}, []
        return self.model(input_ids=ids, use_cache=False).logits

    def wants(self, layer: int) -> bool:
        """See ``AttentionHook``."""
        return layer in self._active

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, softcap: float | None
    ) -> Tensor | None:
        """See ``AttentionHook``."""
        if layer not in self._active:
            return None
        before_rope = self.before_rope(layer, key)
        sides = zip(KINDS, (before_rope, value), strict=True)
        slots = {
            Slot(layer, head, kind): side[:, head].float() for kind, side in sides for head in range(side.shape[1])
        }
        decoded = self._decode(layer, slots)
        keys = torch.stack([decoded[Slot(layer, head, "key")] for head in range(key.shape[1])], dim=1)
        values = torch.stack([decoded[Slot(layer, head, "value")] for head in range(key.shape[1])], dim=1)
        keys = self.after_rope(layer, keys)
        sinks = self.plan.sinks
        keys = torch.cat([key[:, :, :sinks].float(), keys[:, :, sinks:]], dim=2)
        values = torch.cat([value[:, :, :sinks].float(), values[:, :, sinks:]], dim=2)
        exactly = read_exactly(key.shape[2], self._step_tokens, key.device)
        return compressed_attention(query, (key, value), (keys, values), exactly, scaling, softcap)

    def _decode(self, layer: int, slots: dict[Slot, Tensor]) -> dict[Slot, Tensor]:
        """What the cache gives back for every slot of a layer."""
        sinks, decoded = self.plan.sinks, dict(slots)
        # Products in float32 also under autocast: the cache encodes and decodes in float32.
        with torch.autocast(next(iter(slots.values())).device.type, enabled=False):
            for index in self._blocks.get(layer, ()):
                own = self.plan.blocks[index].slots
                if str(index) not in self._units:
                    continue  # lossless
                x = torch.cat([slots[slot] for slot in own], dim=-1)
                y = self._units[str(index)](x)
                self.distances.append((x - y)[:, sinks:].abs().mean())
                decoded.update(zip(own, y.split(self.plan.geometry.head_dim, dim=-1), strict=True))
        for slot in slots:
            source = self.plan.stored_source[slot]
            if source != slot and source.layer in self._active:
                decoded[slot] = self._stored[source]
                self.distances.append((slots[slot] - decoded[slot])[:, sinks:].abs().mean())
        self._stored |= {slot: decoded[slot] for slot in slots if slot in self._sources}
        return decoded
