"""Putting another attention in a model's place for a while, by name, for analysis and training.

Nothing of the model's class is changed: a named attention function asks the hook that is in charge.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..geometry import KVGeometry
from ..kernels.rotary import RotaryTable
from .interface import base_function, base_of, register, switch
from .rotation import learn_rotations
from .structure import find_decoder

_NAME = "kvcar_hook_"
_current: WeakKeyDictionary[nn.Module, AttentionHook] = WeakKeyDictionary()


class AttentionHook(ABC):
    """A context manager inside which attention of a model's layers goes through ``attend``.

    Args:
        model: a causal language model; restored at the end.
        geometry: its KV cache.
    """

    def __init__(self, model: PreTrainedModel, geometry: KVGeometry) -> None:
        self.model, self.geometry = model, geometry
        self.parts = find_decoder(model)
        self._calls: dict[nn.Module, int] = {}
        self.tables: dict[int, RotaryTable] = {}

    @abstractmethod
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
        """Attention output ``[B, Hq, T, D]`` over a layer's keys, or None where the model's own is right.

        Args:
            layer: whose keys they are; several layers may read them.
            query: ``[B, Hq, T, D]`` after RoPE.
            key, value: ``[B, H, T, D]``, keys after RoPE.
            scaling: factor on the scores.
            softcap: scores become ``softcap * tanh(score / softcap)`` where given.
            sinks: ``[Hq]``, one more score for each query head that no value belongs to, where given.
        """

    def layer_of(self, module: nn.Module) -> int | None:
        """Which layer's keys a module reads in the call under way; None where the cache knows none of them."""
        layers = self.parts.readers.get(module, ())
        if not layers:
            return None
        call = self._calls[module] = self._calls.get(module, -1) + 1
        return layers[call % len(layers)]

    def hidden(self, layer: int, tokens: int, device: torch.device) -> Tensor:
        """Which query (row) of a sequence does not attend to which token (column): later ones, those its window has passed; bool ``[T, T]``."""
        index = torch.arange(tokens, device=device)
        hidden = index[None] > index[:, None]
        if layer not in self.geometry.windowed_layers:
            return hidden
        window = self.geometry.sliding_window
        first = index // window * window if self.geometry.chunked else index - window + 1
        return hidden | (index[None] < first[:, None])

    def before_rope(self, layer: int, key: Tensor) -> Tensor:
        """Keys ``[B, H, T, D]`` float32 as they were before RoPE, of positions 0 on."""
        return self.tables[layer].unrotate(key, positions_of(key)) if layer in self.tables else key.float()

    def after_rope(self, layer: int, key: Tensor) -> Tensor:
        """The inverse of ``before_rope``."""
        return self.tables[layer].rotate(key, positions_of(key)) if layer in self.tables else key.float()

    def __enter__(self) -> Self:
        base = base_of(self.parts.decoder)
        register(_NAME + base, base, _attention)
        if not self.tables:
            self.tables = learn_rotations(self.model, self.geometry)
        self._calls = {}
        for module in self.parts.readers:
            _current[module] = self
        self._switch_back = switch(self.parts.decoder, _NAME + base)
        return self

    def __exit__(self, *_: object) -> None:
        for module in self.parts.readers:
            _current.pop(module, None)
        self._switch_back()


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Run a model without gradients for its parameters; afterwards each asks for one as it did before."""
    asked = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, before in asked.items():
            parameter.requires_grad_(before)


def positions_of(key: Tensor) -> Tensor:
    """Positions int64 ``[1, T]`` of keys ``[B, H, T, D]`` that begin a sequence."""
    return torch.arange(key.shape[2], device=key.device)[None]


def _attention(
    base: str,
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
    hook = _current.get(module)
    layer = None if hook is None else hook.layer_of(module)
    if hook is not None and layer is not None:
        scale = float(query.shape[-1]) ** -0.5 if scaling is None else scaling
        # Layers may compute on several devices; what a hook knows of them lies on one.
        there, sinks = hook.parts.device, kwargs.get("s_aux")
        sinks = None if sinks is None else sinks.to(there)
        output = hook.attend(
            layer, query.to(there), key.to(there), value.to(there), scale, kwargs.get("softcap"), sinks
        )
        if output is not None:
            return output.transpose(1, 2).contiguous().to(query.device), None
    function = base_function(base, module)
    return function(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
