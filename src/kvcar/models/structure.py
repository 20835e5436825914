"""Finding, in any transformers model, the decoder that a cache passes through and its attention modules."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch
from torch import nn

from ..errors import UnsupportedModelError


@dataclass(frozen=True)
class DecoderParts:
    """The module whose forward is given the cache, and its attention modules by layer."""

    decoder: nn.Module
    attention: tuple[nn.Module, ...]

    @property
    def device(self) -> torch.device:
        """Where the keys and values are computed."""
        return next(self.attention[0].parameters()).device


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
    """The innermost common ancestor of the named modules whose forward takes ``past_key_values`` and is given the inputs.

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
        if {"past_key_values", "inputs_embeds"} <= inspect.signature(module.forward).parameters.keys():
            return module
    raise UnsupportedModelError(f"no module of {type(model).__name__} takes past_key_values")
