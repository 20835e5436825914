"""Seeing the keys and values of a model go by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer

from ..geometry import KVGeometry
from .structure import own_cache_layers

OnKeysValues = Callable[[int, Tensor, Tensor], None]
"""(layer, keys after RoPE ``[B, H, T, D]``, values ``[B, H, T, D]``) -> None."""


class WatchingCache(Cache):
    """A cache that shows the keys and values of layers that may be coded, and keeps nothing of them.

    Args:
        config: of the model; its other layers are those of its own cache.
        geometry: of the model.
        on_keys_values: called once for each such layer in a pass.
        device: where they are shown, wherever layers compute.
    """

    def __init__(
        self, config: PreTrainedConfig, geometry: KVGeometry, on_keys_values: OnKeysValues, device: torch.device
    ) -> None:
        layers = own_cache_layers(config)

        def show(layer: int, keys: Tensor, values: Tensor) -> None:
            on_keys_values(layer, keys.to(device), values.to(device))

        for layer in geometry.codable_layers:
            if hasattr(layers[layer], "recurrent_states"):
                layers[layer] = _WatchingStateLayer(layer, show, layers[layer])
            else:
                layers[layer] = _WatchingLayer(layer, show)
        super().__init__(layers=layers)


class _WatchingLayer(DynamicLayer):
    """Shows what passes and keeps nothing."""

    def __init__(self, layer: int, on_keys_values: OnKeysValues) -> None:
        DynamicLayer.__init__(self)
        self._layer, self._on_keys_values = layer, on_keys_values

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        del args, kwargs
        self._on_keys_values(self._layer, key_states, value_states)
        return key_states, value_states


class _WatchingStateLayer(LinearAttentionLayer, _WatchingLayer):  # pyright: ignore[reportIncompatibleMethodOverride]
    """The same for a layer that keeps a state beside them, as ``own`` does."""

    is_compileable = False

    def __init__(self, layer: int, on_keys_values: OnKeysValues, own: Any) -> None:
        number = getattr(own, "number_of_states", None)
        _WatchingLayer.__init__(self, layer, on_keys_values)
        LinearAttentionLayer.__init__(self, **({} if number is None else {"number_of_states": number}))
