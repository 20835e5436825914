"""Running a model as if its cache were compressed: one pass over all tokens, differentiable.

Every layer's keys and values are coded and decoded as the layer computes them, so that errors compound through the
layers as they do when a text is stepped through the cache with window 0.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import InputError
from ..kernels.rotary import RotaryTable
from ..models.rotary_probe import RotaryProbe
from ..models.structure import find_decoder
from ..plan import Plan
from ..shapes import KINDS, Slot
from .attention import compressed_attention, read_exactly

Units = Mapping[str, Any] | nn.ModuleDict
_NAME = "kvcar_train"
_current: WeakKeyDictionary[nn.Module, Simulator] = WeakKeyDictionary()


class Simulator:
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
        self.plan, self._units, self._step_tokens = plan, units, step_tokens
        self._model = model
        self._parts = find_decoder(model, plan.geometry.layers)
        self._active: frozenset[int] = frozenset(plan.coded_layers)
        self._tables: dict[int, RotaryTable] = {}
        self._blocks: dict[int, list[int]] = {}
        for index, block in enumerate(plan.blocks):
            self._blocks.setdefault(block.slots[0].layer, []).append(index)
        self._sources = {source for slot, source in plan.stored_source.items() if slot != source}
        self._stored: dict[Slot, Tensor] = {}
        self.distances: list[Tensor] = []

    def __enter__(self) -> Simulator:
        self._base = str(self._model.config.get_text_config()._attn_implementation)
        if self._base != "sdpa":
            raise InputError(f"training needs a model with sdpa attention, got {self._base!r}")
        AttentionInterface.register(_NAME, _attention)
        AttentionMaskInterface.register(_NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
        self._probe = RotaryProbe(self._parts.decoder)
        self._handles = list(self._probe.handles)
        for module in self._parts.attention:
            _current[module] = self
            self._handles.append(module.register_forward_pre_hook(self._note_rotary, with_kwargs=True))
        self._handles.append(self._parts.decoder.register_forward_hook(lambda *_: self._probe.forget()))
        self._set_attention(_NAME)
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        for module in self._parts.attention:
            _current.pop(module, None)
        self._set_attention(self._base)

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
        return self._model(input_ids=ids, use_cache=False).logits

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, softcap: float | None):
        """Attention of an active layer, or None where the model's own is right."""
        if layer not in self._active:
            return None
        slots = self._slots_before_rope(layer, key, value)
        decoded = self._decode(layer, slots)
        keys = torch.stack([decoded[Slot(layer, head, "key")] for head in range(key.shape[1])], dim=1)
        values = torch.stack([decoded[Slot(layer, head, "value")] for head in range(key.shape[1])], dim=1)
        if layer in self._tables:
            keys = self._tables[layer].rotate(keys, self._positions(key))
        sinks = self.plan.sinks
        keys = torch.cat([key[:, :, :sinks].float(), keys[:, :, sinks:]], dim=2)
        values = torch.cat([value[:, :, :sinks].float(), values[:, :, sinks:]], dim=2)
        exactly = read_exactly(key.shape[2], self._step_tokens, key.device)
        return compressed_attention(query, (key, value), (keys, values), exactly, scaling, softcap)

    def _slots_before_rope(self, layer: int, key: Tensor, value: Tensor) -> dict[Slot, Tensor]:
        """Vectors float32 ``[B, T, D]`` of all slots of a layer."""
        if layer in self._tables:
            key = self._tables[layer].unrotate(key, self._positions(key))
        sides = zip(KINDS, (key, value), strict=True)
        return {Slot(layer, head, kind): side[:, head].float() for kind, side in sides for head in range(side.shape[1])}

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

    def _positions(self, key: Tensor) -> Tensor:
        return torch.arange(key.shape[2], device=key.device)[None]

    def _note_rotary(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del args
        layer = int(module.layer_idx)  # pyright: ignore[reportArgumentType]
        if self.plan.geometry.rotary and layer in self._active and layer not in self._tables:
            self._tables[layer] = self._probe.table(kwargs.get("position_embeddings"))

    def _set_attention(self, implementation: str) -> None:
        decoder = self._parts.decoder
        (decoder if isinstance(decoder, PreTrainedModel) else self._model).set_attn_implementation(implementation)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one layer; see ``transformers.AttentionInterface`` for the arguments."""
    simulator = _current.get(module)
    layer = getattr(module, "layer_idx", None)
    if simulator is not None and isinstance(layer, int):
        scale = scaling or float(query.shape[-1]) ** -0.5
        output = simulator.attend(layer, query, key, value, scale, kwargs.get("softcap"))
        if output is not None:
            return output.transpose(1, 2).contiguous(), None
    base = ALL_ATTENTION_FUNCTIONS["sdpa"]
    return base(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
