"""Caches whose decode steps are timed, each with the model that it is used with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from contenders import named_bundles
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import DynamicLayer

from kvcar.bundle import Bundle
from kvcar.cache.cache import KVCarCache
from kvcar.errors import InputError
from kvcar.evaluate.memory import kept_bytes
from kvcar.models.structure import cache_argument

from .device import now

FULL, STATIC = "DynamicCache", "StaticCache"
_WARM_UP_STEPS = 3


@dataclass
class Runner:
    """A cache that is fed in turn with others, and what feeding it took.

    Attributes:
        name: of the contender.
        family: full, transformers or kvcar.
        model: what it is fed to; see ``twin``.
        new_cache: makes an empty one.
        cache: what it holds so far.
        config: what was chosen, for the record.
        fed: tokens that it holds.
        chunk_seconds: of every chunk of the prompt.
    """

    name: str
    family: str
    model: PreTrainedModel
    new_cache: Callable[[], Cache]
    config: dict[str, Any] = field(default_factory=dict)
    fed: int = 0
    chunk_seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.cache = self.new_cache()

    @torch.no_grad()
    def feed(self, ids: Tensor) -> float:
        """Seconds that tokens ``ids`` int64 ``[B, T]`` take in one pass."""
        began = now(ids.device)
        self.model(input_ids=ids, **cache_argument(self.model, self.cache), use_cache=True, logits_to_keep=1)
        seconds = now(ids.device) - began
        self.fed += ids.shape[1]
        return seconds

    def prefill(self, ids: Tensor) -> float:
        """Seconds of a chunk of the prompt, noted."""
        self.chunk_seconds.append(self.feed(ids))
        return self.chunk_seconds[-1]

    def decode(self, ids: Tensor) -> list[float]:
        """Seconds of each step over ``ids`` int64 ``[B, steps]``, a token at a time."""
        return [self.feed(ids[:, index : index + 1]) for index in range(ids.shape[1])]

    def warm_up(self, ids: Tensor, chunk: int) -> None:
        """Run over two chunks of ``ids`` and a few tokens with a cache that is thrown away, so that all is compiled."""
        kept, fed, self.cache = self.cache, self.fed, self.new_cache()
        for start in (0, chunk):
            self.feed(ids[:, start : start + chunk])
        self.decode(ids[:, 2 * chunk : 2 * chunk + _WARM_UP_STEPS])
        self.cache, self.fed = kept, fed

    @property
    def held_bytes(self) -> int:
        """Bytes that it holds, what is floating point in transformers' caches counted as bfloat16."""
        return self.cache.stored_bytes() if isinstance(self.cache, KVCarCache) else kept_bytes(self.cache)


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """A second model over the same weights.

    Attaching leaves hooks in a model that the other caches have no use for, so they get one without.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def static_copy(full: Cache, config: Any, room_tokens: int) -> StaticCache:
    """A static cache with what a full one holds, and room for ``room_tokens`` more; raises InputError if layers slide."""
    if any(type(layer) is not DynamicLayer for layer in full.layers):
        raise InputError("a static cache cannot be filled from layers that slide; leave it out with --no-static")
    static = StaticCache(config=config, max_cache_len=full.get_seq_length() + room_tokens)
    for index, layer in enumerate(full.layers):
        assert isinstance(layer, DynamicLayer)
        assert layer.keys is not None
        assert layer.values is not None
        static.update(layer.keys, layer.values, index)
    return static


def full_runner(model: PreTrainedModel) -> Runner:
    """Transformers' default cache."""
    return Runner(FULL, "full", model, lambda: DynamicCache(config=model.config))


def bundle_runners(model: PreTrainedModel, bundles: Mapping[str, Bundle]) -> list[Runner]:
    """Compressed caches; ``model`` is attached."""
    return [_bundle_runner(model, name, bundle) for name, bundle in bundles.items()]


def _bundle_runner(model: PreTrainedModel, name: str, bundle: Bundle) -> Runner:
    config = {"window": bundle.plan.window, "bundle_sha256": bundle.digest}
    return Runner(name, "kvcar", model, lambda: KVCarCache(bundle), config)


def read_bundles(given: Sequence[str]) -> dict[str, Bundle]:
    """Load bundles of ``NAME=FOLDER`` or ``FOLDER``, by name; raises as ``named_bundles`` does."""
    bundles = named_bundles(given)
    for name in {FULL, STATIC} & bundles.keys():
        raise InputError(f"two contenders would be called {name!r}; write NAME=FOLDER with names of their own")
    return bundles
