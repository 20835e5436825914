"""The named attention functions that attached models call, one for each implementation they stand in for.

For layers of a ``KVCarCache`` that are coded they attend over the compressed past; everywhere else they call, unchanged,
the implementation that the model had. Compiled models get there too: ``torch.compile`` takes attention over a compressed cache as
one opaque operator, whose handle says where the cache of the pass is; what the cache does in there is never traced.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from itertools import count
from typing import Any, NamedTuple, NoReturn, SupportsIndex, TypeVar, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from ..errors import AttachError, UnsupportedModelError
from ..models.interface import base_function, honoured, register
from ..models.structure import HONOURED
from .cache import KVCarCache

STAND_IN_PREFIX = "kvcar_"
# Of what a model's attention reads: known to be of no consequence where the past is causal and complete.
_IGNORED = {"is_causal", "position_ids", "use_cache", "cache_position", "output_attentions", "sliding_window"}
_ATTRIBUTE = "kvcar_current"

_handles = count()
_alive: WeakValueDictionary[int, Current] = WeakValueDictionary()
F = TypeVar("F", bound=Callable[..., Any])


def _no_cache() -> None:
    """Stand for a pass over no cache of kvcar's."""


def uncompiled(function: F) -> F:
    """Keep ``torch.compile`` out of a function: never traced, nor what it calls.

    For what keeps state that changes from pass to pass, which a trace would take for constant.
    """
    return cast(F, torch.compiler.disable(function))


class _Pass(NamedTuple):
    """A way to the cache of a pass, and the tokens of each of its sequences."""

    cache: Callable[[], KVCarCache | None]
    tokens: int


class Current:
    """The cache of an attached model's pass, one for each thread that runs the model.

    A pass may begin within another (in a hook, say), over another cache or none; the outer one goes on with its own afterwards.

    Attributes:
        handle: by which the operator finds this object.
    """

    def __init__(self) -> None:
        self._by_thread = threading.local()
        self._lock, self._in_a_pass, self._closed = threading.Lock(), set[int](), False
        self.handle = next(_handles)
        _alive[self.handle] = self

    @property
    def cache(self) -> KVCarCache | None:
        """The cache; None outside of a pass, and where the model was given another cache."""
        passes = self._passes()
        return passes[-1].cache() if passes else None

    @property
    def tokens(self) -> int:
        """Tokens of each sequence in the pass; 0 outside of one."""
        passes = self._passes()
        return passes[-1].tokens if passes else 0

    def enter(self, cache: KVCarCache | None, tokens: int) -> None:
        """Begin a pass over ``cache``, None for one of another kind; raises AttachError where the model is detached just now."""
        passes = self._passes()
        if cache is not None:
            # A pass over the same cache that is there yet was ended by an interrupt, and those within it too.
            del passes[next((n for n, other in enumerate(passes) if other.cache() is cache), len(passes)) :]
        with self._lock:
            if cache is not None and self._closed:
                raise AttachError("another thread detached the model as this pass began; attach it again")
            # The caller has the cache; that of a pass that an interrupt ended is not kept alive from here.
            passes.append(_Pass(_no_cache if cache is None else weakref.ref(cache), tokens))
            self._note(passes)

    def leave(self, cache: KVCarCache | None) -> bool:
        """End the pass over ``cache``; False where it is not the one that began last."""
        passes = self._passes()
        if not passes or passes[-1].cache() is not cache:
            return False
        passes.pop()
        with self._lock:
            self._note(passes)
        return True

    def _passes(self) -> list[_Pass]:
        """Passes of the thread that asks, the innermost last."""
        if not hasattr(self._by_thread, "passes"):
            self._by_thread.passes = []
        return self._by_thread.passes

    def _note(self, passes: list[_Pass]) -> None:
        if any(other.cache() is not None for other in passes):
            self._in_a_pass.add(threading.get_ident())
        else:
            self._in_a_pass.discard(threading.get_ident())

    @property
    def mask(self) -> Tensor | None:
        """The mask ``[B, N]`` that a module around the decoder was given in this pass."""
        return getattr(self._by_thread, "mask", None)

    @mask.setter
    def mask(self, mask: Tensor | None) -> None:
        self._by_thread.mask = mask

    def close(self) -> None:
        """Let no pass begin any more; raises AttachError where another thread is in one, which would lose its past."""
        with self._lock:
            alive = {thread.ident for thread in threading.enumerate()} - {threading.get_ident()}
            if alive & self._in_a_pass:
                raise AttachError(
                    "another thread is in a pass of this model; let it finish before the model is detached, and use "
                    "kvcar.detach(model) then"
                )
            self._closed = True

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        """Refuse copies and pickles of an attached model, which come by here."""
        raise AttachError(
            "an attached model can neither be copied nor pickled, as its hooks belong to it alone; detach it first "
            "(model.save_pretrained and state_dict work as ever)"
        )


def set_current(module: nn.Module, current: Current | None, layers: tuple[int, ...] = ()) -> None:
    """Tell an attention module where to look, and whose keys it reads; None when its model is detached."""
    if current is None:
        module.__dict__.pop(_ATTRIBUTE, None)
    else:
        module.__dict__[_ATTRIBUTE] = (current, layers)


def is_attached(module: nn.Module) -> bool:
    """Whether an attention module is one of an attached model."""
    return _ATTRIBUTE in module.__dict__


def stand_in_for(base: str) -> str:
    """Register, if need be, and name the attention implementation that stands in for ``base``."""
    name = STAND_IN_PREFIX + base
    register(name, base, _attention)
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
    current, layers = getattr(module, _ATTRIBUTE, (None, ()))
    cache = None if current is None else current.cache
    layer = None if cache is None else _layer_read(cache, layers, key, value)
    if current is None or cache is None or layer is None:
        function = base_function(base, module)
        mask = attention_mask
        if mask is None and current is not None and _is_of_last(current, cache, query.shape[2], key.shape[2]):
            mask = _mask_of_last(base, module, query, key, kwargs.get("is_causal"))
        return function(module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs)
    softcap, sinks = kwargs.pop("softcap", None), kwargs.pop("s_aux", None)
    _refuse_unknown(base, module, dropout, kwargs)
    _refuse_not_causal(module, query, attention_mask, kwargs.get("is_causal"))
    scale = float(query.shape[-1]) ** -0.5 if scaling is None else float(scaling)
    if torch.compiler.is_compiling():
        return attend_layer(query, key, value, attention_mask, scale, softcap, sinks, layer, current.handle), None
    cache.check_given(layer, query.shape[2], key, value, attention_mask)
    with torch.no_grad():
        output = cache.attend(layer, query, scale, softcap, sinks)
    differentiable = torch.is_grad_enabled() and query.requires_grad
    return cast(Tensor, _NotDifferentiable.apply(output, query)) if differentiable else output, None


def _is_of_last(current: Current, cache: KVCarCache | None, queries: int, keys: int) -> bool:
    """Whether queries are those of a pass' last tokens alone; fewer than keys are also the first tokens of a static cache."""
    if cache is None:
        return not torch.compiler.is_compiling() and 1 < queries < current.tokens
    return 1 < queries < keys


def _mask_of_last(base: str, module: nn.Module, query: Tensor, key: Tensor, is_causal: bool | None) -> Tensor | None:
    """The mask that sdpa needs where queries are those of the last tokens alone, which it would take for the first ones.

    Models know that and pass all queries to an implementation that is named sdpa; ours has another name.
    """
    queries, keys = query.shape[2], key.shape[2]
    if base != "sdpa" or not _causal(module, is_causal):
        return None
    return torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)


def _causal(module: nn.Module, is_causal: bool | None) -> bool:
    """Whether later tokens are hidden where there is no mask: the module says so, or its call."""
    return bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)


def _layer_read(cache: KVCarCache, layers: tuple[int, ...], key: Tensor, value: Tensor) -> int | None:
    """Which coded layer's keys a module reads that reads those of ``layers``; None for a layer that is not coded."""
    # Where it is not the very tensors, the cache looks whether it is their numbers.
    layer = None if torch.compiler.is_compiling() else cache.layer_of(key, value)
    return next(filter(cache.codes, layers), None) if layer is None else layer


def _refuse_unknown(base: str, module: nn.Module, dropout: float, kwargs: dict[str, Any]) -> None:
    if dropout:
        raise UnsupportedModelError("a compressed cache is for inference; call model.eval() first (dropout is on)")
    if kwargs.get("output_attentions"):
        raise UnsupportedModelError(
            "attention weights are never formed with a compressed cache; leave output_attentions off"
        )
    asked = [name for name, given in kwargs.items() if given is not None and name not in _IGNORED | HONOURED]
    unknown = [name for name in asked if name in honoured(base, module)]
    if unknown:
        raise UnsupportedModelError(
            f"the model asks for attention with {', '.join(unknown)}, which kvcar cannot honour in a compressed layer"
        )


def _refuse_not_causal(module: nn.Module, query: Tensor, mask: Tensor | None, is_causal: bool | None) -> None:
    """Where there is no mask, the module or its call says whether later tokens are seen; a mask says so itself."""
    if mask is None and query.shape[2] > 1 and not _causal(module, is_causal):
        raise UnsupportedModelError(
            f"{type(module).__name__} attends to later tokens too (is_causal is False), and a compressed cache is causal"
        )


class _NotDifferentiable(torch.autograd.Function):
    """Attention whose gradient is refused instead of left out, as soon as anybody asks for it."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, query: Tensor) -> Tensor:
        """Give the output as it is."""
        del ctx, query
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> NoReturn:
        """Refuse."""
        del ctx, gradients
        raise UnsupportedModelError(
            "gradients do not pass through a compressed cache; run the model without one (use_cache=False) to train it"
        )


# A CUDA graph would replay the kernels of one step for ever; the tag makes the compiler cut its graphs around the operator.
@torch.library.custom_op(
    "kvcar::attend_layer",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor? mask, float scaling, float? softcap, Tensor? sinks, int layer, "
    "int handle) -> Tensor",
    tags=(torch.Tag.cudagraph_unsafe,),
)
def attend_layer(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, softcap: float | None,
    sinks: Tensor | None, layer: int, handle: int,
) -> Tensor:  # fmt: skip
    """``write`` and ``attend`` of a coded layer in one, for compiled models."""
    current = _alive.get(handle)
    cache = None if current is None else current.cache
    if cache is None:
        raise UnsupportedModelError(
            "attention was compiled for an attachment that is gone, or runs outside of the model's decoder; call "
            "torch._dynamo.reset() and run the model again"
        )
    if cache.is_written(layer):  # another layer reads these keys
        cache.check_given(layer, query.shape[2], key, value, mask)
    else:
        # Compiled code uses the memory of its tensors again, while the cache holds on to these to the end of the pass.
        cache.write(layer, key.clone(), value.clone())
        cache.check_mask(mask, layer, query.shape[2])
    return cache.attend(layer, query, scaling, softcap, sinks)


@attend_layer.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, softcap: float | None,
    sinks: Tensor | None, layer: int, handle: int,
) -> Tensor:  # fmt: skip
    del key, value, mask, scaling, softcap, sinks, layer, handle
    batch, heads, tokens, dim = query.shape
    return query.new_empty(batch, tokens, heads, dim)
