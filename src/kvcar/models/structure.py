"""Finding, in any transformers model, the decoder that a cache passes through, and seeing its keys and values go by."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from ..errors import UnsupportedModelError
from ..geometry import KVGeometry

TRANSFORMERS_VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
CACHE_NAMES = ("cache", "past_key_values")
"""What modules call the cache they are given: from transformers 5.24 on, and before."""
CACHE_NAME = CACHE_NAMES[TRANSFORMERS_VERSION < (5, 24)]
"""What ``generate`` calls it inside, whatever its caller did."""


@dataclass(frozen=True)
class DecoderParts:
    """The module whose forward is given the cache, and its attention modules by layer."""

    decoder: nn.Module
    attention: tuple[nn.Module, ...]

    @property
    def device(self) -> torch.device:
        """Where the keys and values are computed."""
        return next(self.attention[0].parameters()).device


def check_is_model(model: object, what: str) -> None:
    """Refuse what is no model of transformers, by the name of the function that takes one; raises UnsupportedModelError."""
    if isinstance(model, PreTrainedModel):
        return
    inner = ""
    if hasattr(model, "get_base_model"):
        inner = " (of a PeftModel: its get_base_model(), and go on using the PeftModel)"
    elif hasattr(model, "model"):
        inner = " (its attribute model)"
    raise UnsupportedModelError(f"{what} takes a model of transformers, got {type(model).__name__}{inner}")


def find_decoder(model: nn.Module, layers: int) -> DecoderParts:
    """Find both by structure, not by family.

    Raises:
        UnsupportedModelError: no one-to-one match of layers and attention modules, or they lie on several devices.
    """
    named = {name: m for name, m in model.named_modules() if _is_attention(m)}
    by_layer = {_layer_index(m): m for m in named.values()}
    if len(named) != layers or sorted(by_layer) != list(range(layers)):
        raise UnsupportedModelError(
            f"{type(model).__name__} has {len(named)} attention modules with a layer_idx, but its config has {layers} layers"
        )
    devices = {p.device for m in named.values() for p in m.parameters()}
    if len(devices) != 1:
        raise UnsupportedModelError(
            f"attention layers lie on several devices ({sorted(map(str, devices))}); kvcar needs one"
        )
    if not getattr(model, "_supports_attention_backend", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} does not take named attention functions (AttentionInterface)"
        )
    attention = tuple(by_layer[layer] for layer in range(layers))
    return DecoderParts(_innermost_with_cache(model, list(named)), attention)


def _layer_index(module: nn.Module) -> int:
    """The layer a module says it belongs to, -1 if it says none."""
    index = getattr(module, "layer_idx", None)
    return index if isinstance(index, int) else -1


def _is_attention(module: nn.Module) -> bool:
    return "attention" in type(module).__name__.lower() and _layer_index(module) >= 0


def _innermost_with_cache(model: nn.Module, names: list[str]) -> nn.Module:
    """The innermost common ancestor of the named modules whose forward takes a cache and is given the inputs.

    A layer takes a cache too, and is an ancestor of all attention modules where it is the only layer.
    """
    paths = [name.split(".")[:-1] for name in names]
    common = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    for depth in range(len(common), -1, -1):
        module = model.get_submodule(".".join(common[:depth]))
        parameters = inspect.signature(module.forward).parameters
        if "inputs_embeds" in parameters and any(name in parameters for name in CACHE_NAMES):
            return module
    raise UnsupportedModelError(f"no module of {type(model).__name__} takes a cache ({' or '.join(CACHE_NAMES)})")


def cache_argument(module: nn.Module, cache: Cache) -> dict[str, Any]:
    """Give ``cache`` as the keyword argument that the forward of ``module`` knows it by."""
    parameters = inspect.signature(module.forward).parameters
    return {next((name for name in CACHE_NAMES if name in parameters), CACHE_NAME): cache}


OnKeysValues = Callable[[int, Tensor, Tensor], None]
"""(layer, keys after RoPE ``[B, H, T, D]``, values ``[B, H, T, D]``) -> None."""


class WatchingCache(Cache):
    """A cache that shows the keys and values of layers that may be coded, and keeps nothing of them.

    Args:
        geometry: of the model.
        on_keys_values: called once for each such layer in a pass.
    """

    def __init__(self, geometry: KVGeometry, on_keys_values: OnKeysValues) -> None:
        layers: list[Any] = [
            _WatchingLayer(layer, on_keys_values) if layer in geometry.codable_layers else DynamicLayer()
            for layer in range(geometry.layers)
        ]
        super().__init__(layers=layers)


class _WatchingLayer(DynamicLayer):
    """Shows what passes and keeps nothing."""

    def __init__(self, layer: int, on_keys_values: OnKeysValues) -> None:
        super().__init__()
        self._layer, self._on_keys_values = layer, on_keys_values

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        del args, kwargs
        self._on_keys_values(self._layer, key_states, value_states)
        return key_states, value_states
