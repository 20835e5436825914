"""Which cache the pass under way reads: what attention, deep inside a model, has to find out.

Compiled models find it too. ``torch.compile`` takes attention over a compressed cache as one opaque operator, whose handle says
where the cache of the pass is; what the cache does in there, growing and changing as it goes, is never traced.
"""

from __future__ import annotations

from itertools import count
from typing import Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError

_ATTRIBUTE = "kvcar_current"

_handles = count()
_alive: WeakValueDictionary[int, Current] = WeakValueDictionary()


class PassCache(Protocol):
    """A cache, as attention sees it: a ``KVCarCache``, or what stands for one while a step is captured."""

    def codes(self, layer: int) -> bool:
        """Whether attention of a layer must come through ``attend``."""
        ...

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Take the keys and values of a layer's pass."""
        ...

    def attend(self, layer: int, query: Tensor, scaling: float, softcap: float | None) -> Tensor:
        """Attention ``[B, T, Hq, D]`` of ``query`` ``[B, Hq, T, D]`` over what is held and what was just taken."""
        ...

    def end_pass(self) -> None:
        """The decoder has run through."""
        ...


class Current:
    """The cache of one attached model's pass; None outside of a pass, and where the model was given another cache.

    Attributes:
        cache: the cache.
        handle: by which the operator finds this object.
    """

    def __init__(self) -> None:
        self.cache: PassCache | None = None
        self.handle = next(_handles)
        _alive[self.handle] = self


def set_current(module: nn.Module, current: Current | None) -> None:
    """Tell an attention module where to look; None when its model is detached."""
    if current is None:
        module.__dict__.pop(_ATTRIBUTE, None)
    else:
        module.__dict__[_ATTRIBUTE] = current


def current_of(module: nn.Module) -> Current | None:
    """Where an attention module has to look, None when its model is not attached."""
    return getattr(module, _ATTRIBUTE, None)


# A CUDA graph would replay the kernels of one step for ever; the tag makes the compiler cut its graphs around the operator.
@torch.library.custom_op(
    "kvcar::attend_layer",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, float scaling, float? softcap, int layer, int handle) -> Tensor",
    tags=(torch.Tag.cudagraph_unsafe,),
)
def attend_layer(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, softcap: float | None, layer: int, handle: int
) -> Tensor:
    """``update`` and ``attend`` of a coded layer in one, for compiled models."""
    current = _alive.get(handle)
    cache = None if current is None else current.cache
    if cache is None:
        raise UnsupportedModelError(
            "attention was compiled for an attachment that is gone, or runs outside of the model's decoder; call "
            "torch._dynamo.reset() and run the model again"
        )
    # Compiled code uses the memory of its tensors again, while the cache holds on to these to the end of the pass.
    cache.update(key.clone(), value.clone(), layer)
    return cache.attend(layer, query, scaling, softcap)


@attend_layer.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, softcap: float | None, layer: int, handle: int
) -> Tensor:
    del key, value, scaling, softcap, layer, handle
    batch, heads, tokens, dim = query.shape
    return query.new_empty(batch, tokens, heads, dim)
