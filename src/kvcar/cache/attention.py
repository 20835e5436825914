"""The named attention functions that attached models call, one for each implementation they stand in for.

For layers of a ``KVCarCache`` that are coded they attend over the compressed past; everywhere else they hand over,
unchanged, to the implementation that the model had.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import UnsupportedModelError
from .current import attend_layer, current_of

STAND_IN_PREFIX = "kvcar_"
_BASES = ("sdpa", "eager")
_IGNORED = {"is_causal", "position_ids", "use_cache", "cache_position", "output_attentions", "output_hidden_states"}


def stand_in_for(base: str) -> str:
    """Register, if need be, and name the attention implementation that stands in for ``base``.

    Raises:
        UnsupportedModelError: ``base`` is an implementation whose masks kvcar does not know.
    """
    if base not in _BASES:
        raise UnsupportedModelError(
            f"the model uses attention implementation {base!r}; kvcar stands in for {' and '.join(_BASES)}; load the "
            "model with attn_implementation='sdpa'"
        )
    name = STAND_IN_PREFIX + base
    AttentionInterface.register(name, partial(_attention, base))
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    return name


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
    current = current_of(module)
    cache = None if current is None else current.cache
    layer = getattr(module, "layer_idx", None)
    if current is None or cache is None or layer is None or not cache.codes(layer):
        function = _base_function(base, module)
        return function(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    softcap = kwargs.pop("softcap", None)
    _refuse_unknown(dropout, kwargs)
    scale: float = scaling or float(query.shape[-1]) ** -0.5
    if torch.compiler.is_compiling():
        return attend_layer(query, key, value, scale, softcap, layer, current.handle), None
    return cache.attend(layer, query, scale, softcap), None


def _base_function(base: str, module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """What the model itself would have called."""
    if base != "eager":
        return ALL_ATTENTION_FUNCTIONS[base]
    # Transformers keeps eager attention next to each model, under this name.
    return sys.modules[type(module).__module__].eager_attention_forward


def _refuse_unknown(dropout: float, kwargs: dict[str, Any]) -> None:
    if dropout:
        raise UnsupportedModelError("a compressed cache is for inference; call model.eval() first (dropout is on)")
    if kwargs.get("output_attentions"):
        raise UnsupportedModelError(
            "attention weights are never formed with a compressed cache; leave output_attentions off"
        )
    unknown = [name for name, given in kwargs.items() if given is not None and name not in _IGNORED]
    if unknown:
        raise UnsupportedModelError(
            f"the model asks for attention with {', '.join(unknown)}, which kvcar cannot honour in a compressed layer"
        )
