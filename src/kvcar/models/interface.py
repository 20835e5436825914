"""Attention functions by name: whose place one of ours takes, and what a model's own attention would have been."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]

_BASES = ("sdpa", "eager")
# What every attention function of transformers takes.
_USUAL = {"module", "query", "key", "value", "attention_mask", "scaling", "dropout", "kwargs"}


def base_of(decoder: nn.Module) -> str:
    """Name the implementation that takes over where ours does not: the model's own, or sdpa for one whose masks are not tensors."""
    # The config of a model may be that of another one too, which is attached.
    named = str(implementation_of(decoder))
    named = named.rpartition("_")[2] if named.startswith("kvcar_") else named
    if named in _BASES:
        return named
    return "sdpa" if getattr(decoder, "_supports_sdpa", False) else "eager"


def stood_in_for(decoder: nn.Module) -> str | None:
    """Name the implementation that a decoder's config asks for and that ours takes the place of altogether, as its masks are not tensors."""
    named = implementation_of(decoder)
    return None if named is None or named in _BASES or named.startswith("kvcar_") else named


def implementation_of(decoder: nn.Module) -> str | None:
    """Name the attention implementation that a decoder uses now."""
    configs = _configs(decoder)
    return configs[0]._attn_implementation if configs else None


def register(name: str, base: str, function: Callable[..., Any]) -> None:
    """Register ``function(base, module, query, ...)`` as the attention ``name``, with the masks of ``base``."""
    AttentionInterface.register(name, partial(function, base))
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])


def switch(decoder: nn.Module, implementation: str) -> Callable[[], None]:
    """Let a decoder, and nothing beside it, use an implementation; returns what switches back."""
    configs = _configs(decoder)
    before = [config._attn_implementation_internal for config in configs]
    for config in configs:
        config._attn_implementation_internal = implementation

    def back() -> None:
        for config, own in zip(configs, before, strict=True):
            config._attn_implementation_internal = own

    return back


@contextmanager
def switched(decoder: nn.Module, implementation: str) -> Iterator[None]:
    """Let a decoder use an implementation for a while."""
    back = switch(decoder, implementation)
    try:
        yield
    finally:
        back()


def base_function(base: str, module: nn.Module) -> AttentionFunction:
    """Find what the model itself would have called."""
    if base != "eager":
        return ALL_ATTENTION_FUNCTIONS[base]
    # Transformers keeps eager attention next to each model, under this name.
    own = sys.modules[type(module).__module__]
    return getattr(own, "eager_attention_forward", ALL_ATTENTION_FUNCTIONS["sdpa"])


def honoured(base: str, module: nn.Module) -> set[str]:
    """Name the arguments beyond the usual ones that the model's own attention reads; it swallows all others unread."""
    parameters = inspect.signature(base_function(base, module)).parameters
    named = {name for name, p in parameters.items() if p.kind is not inspect.Parameter.VAR_KEYWORD}
    # sdpa refuses a cap on scores, and eager functions may take it from among the rest.
    return (named | {"softcap", "output_attentions"}) - _USUAL


def _configs(decoder: nn.Module) -> list[PreTrainedConfig]:
    """Every config that the modules of a decoder look at, its own first."""
    found = {}
    for module in decoder.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig):
            found.setdefault(id(config), config)
    return list(found.values())
