"""Taking out everything that a cache holds, and making a cache that holds it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..bundle import Bundle
from ..errors import CacheStateError
from .cache import KVCarCache
from .coder import PageCoder, UnitContents
from .finer import FinerPages
from .layer import CodedLayer
from .pages import PageStores
from .passes import is_state
from .sequence import SequenceState

KeysValues = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class CacheContents:
    """What a cache holds between two passes.

    Attributes:
        tokens: tokens seen, padding included (``seen``).
        paged: those of them that lie in pages; the ``tokens - paged`` after them are in the window.
        padding, offset: int64 ``[B]``, see ``SequenceState``.
        units: stored values of the ``paged`` tokens, for every unit of a page in order.
        exact: by coded layer, keys (after RoPE) and values ``[B, H, sinks + finer + window, D]`` in the exact dtype.
        plain: by other layer, keys and values ``[B, H, kept, D]`` in the model's dtype; a sliding layer keeps its window
            less one.
        finer: the pages whose tokens are among the exact ones.
    """

    tokens: int
    paged: int
    padding: Tensor
    offset: Tensor
    units: tuple[UnitContents, ...]
    exact: dict[int, KeysValues]
    plain: dict[int, KeysValues]
    finer: FinerPages


@torch.no_grad()
def contents_of(cache: KVCarCache, keep_window: bool) -> CacheContents:
    """What ``cache`` holds; it stays as it is. See ``KVCarCache.save`` for ``keep_window`` and the errors."""
    cache._refuse_if_broken()
    cache._drop_unfinished_pass()
    if cache._state is None or cache._pages is None or cache._seen == 0:
        raise CacheStateError("the cache holds no tokens yet, so there is nothing to save; run the model over some")
    geometry = cache.plan.geometry
    if (
        geometry.own_layers
        or any(map(is_state, cache.layers))
        or len({geometry.elements_of(layer) for layer in range(geometry.layers)}) > 1
    ):
        raise CacheStateError(
            f"layers {list(geometry.own_layers or geometry.sliding_layers or geometry.windowed_layers)} keep a state of the model's own kind, or heads of another "
            "shape, which a stored context has no place for; keep the cache in memory (cache.fork() shares its pages)"
        )
    source = cache if keep_window else _flushed(cache)
    lost = None if source._state is None else source._state.lost
    if lost is not None:
        raise CacheStateError(
            f"sequences {lost.nonzero().flatten().tolist()} of the cache hold NaN or infinity; keep the others alone with "
            "cache.batch_select_indices and save those"
        )
    plain = {index: _plain_kept(layer) for index, layer in enumerate(cache.layers) if isinstance(layer, DynamicLayer)}
    assert source._pages is not None
    assert source._finer is not None
    return CacheContents(
        tokens=cache._seen,
        paged=source._pages.tokens,
        padding=cache._state.padding,
        offset=cache._state.offset,
        units=source._pages.contents(),
        exact={index: _with_passed(layer, source._finer.tokens) for index, layer in source._coded.items()},
        plain=plain,
        finer=source._finer,
    )


def cache_of(contents: CacheContents, bundle: Bundle, coder: PageCoder, window: int | None) -> KVCarCache:
    """A cache that holds ``contents``, on the device of ``coder``; raises InputError as ``KVCarCache`` does."""
    cache, device = KVCarCache(bundle, window), coder.device
    cache._state = SequenceState(0, device)
    cache._state.padding, cache._state.offset = contents.padding.to(device), contents.offset.to(device)
    cache._state.padding_most = int(contents.padding.max())
    cache._seen = contents.tokens
    cache._pages = PageStores(coder)
    cache._pages.fill(contents.units, device)
    cache._finer = contents.finer.mapped(lambda table: table.to(device))
    for index, (keys, values) in contents.exact.items():
        cache._coded[index].restore(contents.paged, keys.to(device), values.to(device), contents.finer.tokens)
    cache._model_dtype = next((keys.dtype for keys, _ in contents.plain.values()), None)
    for index, (keys, values) in contents.plain.items():
        layer = cache.layers[index]
        assert isinstance(layer, DynamicLayer)
        layer.lazy_initialization(keys.to(device), values.to(device))
        layer.keys, layer.values = keys.to(device), values.to(device)
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length = contents.tokens
    cache._free_passed_pages()
    return cache


def _flushed(cache: KVCarCache) -> KVCarCache:
    """A cache of the same tokens, all of them coded."""
    fork = cache.fork()
    fork.flush_window()
    return fork


def _with_passed(layer: CodedLayer, finer: int) -> KeysValues:
    """What a layer keeps exactly, with room for all ``finer`` tokens of finer pages: 0 for those that its window has passed."""
    keys, values = layer.kept()
    passed = finer - layer.finer
    if not passed:
        return keys, values
    start = layer.sinks
    sides = (
        torch.cat([x[:, :, :start], x.new_zeros(*x.shape[:2], passed, x.shape[3]), x[:, :, start:]], 2)
        for x in (keys, values)
    )
    return next(sides), next(sides)


def _plain_kept(layer: DynamicLayer) -> KeysValues:
    """Keys and values that the next pass needs; a layer that records its past for assisted decoding holds more."""
    keys, values = layer.keys, layer.values
    assert keys is not None
    assert values is not None
    if isinstance(layer, DynamicSlidingWindowLayer):
        kept = layer.sliding_window - 1
        return keys[:, :, -kept:], values[:, :, -kept:]
    return keys, values
