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
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import InputError
from ..geometry import KVGeometry
from ..kernels.rotary import RotaryTable
from .rotation import learn_rotations
from .structure import find_decoder

_NAME = "kvcar_hook"
_BASE = "sdpa"
_current: WeakKeyDictionary[nn.Module, AttentionHook] = WeakKeyDictionary()


class AttentionHook(ABC):
    """A context manager inside which attention of a model's layers goes through ``attend``.

    Args:
        model: a causal language model using sdpa attention; restored at the end.
        geometry: its KV cache.
    """

    def __init__(self, model: PreTrainedModel, geometry: KVGeometry) -> None:
        self.model, self.geometry = model, geometry
        self.parts = find_decoder(model, geometry.layers)
        self.tables: dict[int, RotaryTable] = {}

    @abstractmethod
    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, softcap: float | None
    ) -> Tensor | None:
        """Attention output ``[B, Hq, T, D]`` of a layer, or None where the model's own is right.

        Args:
            layer: its index.
            query: ``[B, Hq, T, D]`` after RoPE.
            key, value: ``[B, H, T, D]``, keys after RoPE.
            scaling: factor on the scores.
            softcap: scores become ``softcap * tanh(score / softcap)`` where given.
        """

    def before_rope(self, layer: int, key: Tensor) -> Tensor:
        """Keys ``[B, H, T, D]`` float32 as they were before RoPE, of positions 0 on."""
        return self.tables[layer].unrotate(key, positions_of(key)) if layer in self.tables else key.float()

    def after_rope(self, layer: int, key: Tensor) -> Tensor:
        """The inverse of ``before_rope``."""
        return self.tables[layer].rotate(key, positions_of(key)) if layer in self.tables else key.float()

    def __enter__(self) -> Self:
        self._base = str(self.model.config.get_text_config()._attn_implementation)
        if self._base != _BASE:
            raise InputError(f"this needs a model with {_BASE} attention, got {self._base!r}")
        AttentionInterface.register(_NAME, _attention)
        AttentionMaskInterface.register(_NAME, ALL_MASK_ATTENTION_FUNCTIONS[_BASE])
        if not self.tables:
            self.tables = learn_rotations(self.model, self.geometry)
        for module in self.parts.attention:
            _current[module] = self
        self._set_attention(_NAME)
        return self

    def __exit__(self, *_: object) -> None:
        for module in self.parts.attention:
            _current.pop(module, None)
        self._set_attention(self._base)

    def _set_attention(self, implementation: str) -> None:
        decoder = self.parts.decoder
        (decoder if isinstance(decoder, PreTrainedModel) else self.model).set_attn_implementation(implementation)


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
    layer = getattr(module, "layer_idx", None)
    if hook is not None and isinstance(layer, int):
        scale = scaling or float(query.shape[-1]) ** -0.5
        output = hook.attend(layer, query, key, value, scale, kwargs.get("softcap"))
        if output is not None:
            return output.transpose(1, 2).contiguous(), None
    base = ALL_ATTENTION_FUNCTIONS[_BASE]
    return base(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
