"""Finding, in any transformers model, the decoder that a cache passes through, and what each of its layers does with the cache.

Nothing is concluded from names: a few tokens run through the model, and what asks the cache and calls attention is noted.
"""

from __future__ import annotations

import inspect
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
import transformers
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel, cache_utils
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from ..errors import KVCarError, UnsupportedModelError
from .interface import base_function, base_of, honoured, register, switched
from .weights import device_of, is_offloaded

TRANSFORMERS_VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
CACHE_NAMES = ("cache", "past_key_values")
"""What modules call the cache they are given: from transformers 5.24 on, and before."""
CACHE_NAME = CACHE_NAMES[TRANSFORMERS_VERSION < (5, 24)]
"""What ``generate`` calls it inside, whatever its caller did."""

LayerKind = Literal["full", "sliding", "own"]
"""Grows with the text; keeps a window; anything else, which is the model's own business."""

# Adapters of peft that put keys and values of their own before all others.
_WITH_A_CACHE = {"PREFIX_TUNING", "CARTRIDGE"}

_PROBE = "kvcar_probe"
_PROBE_TOKENS = 6
# What our attention can do beyond the usual, or what changes nothing in a causal pass over a cache.
HONOURED = {"softcap", "s_aux"}
_HARMLESS = {
    "is_causal", "position_ids", "use_cache", "cache_position", "output_attentions", "sliding_window", "cache", "past_key_values",
}  # fmt: skip


class LayerShape(NamedTuple):
    """What a layer gives its cache for one token, and how many heads ask for it."""

    kv_heads: int
    key_dim: int
    value_dim: int
    query_heads: int


@dataclass(frozen=True)
class DecoderParts:
    """What a cache passes through.

    Attributes:
        decoder: the innermost module whose forward is given the cache and the inputs.
        entries: all such modules from the outermost to the decoder.
        kinds: what each layer of the cache keeps.
        windows: tokens that sliding layers see, by layer.
        shapes: by layer, of those whose keys and values reach attention as the cache gives them.
        attention: by layer, the module that wrote it; one that reads another's keys is not among them.
        readers: by attention module, the layers whose keys it reads, in the order of its calls in a pass.
        reasons: by layer, why it cannot be compressed.
    """

    decoder: nn.Module
    entries: tuple[nn.Module, ...]
    kinds: tuple[LayerKind, ...]
    windows: Mapping[int, int]
    shapes: Mapping[int, LayerShape]
    attention: Mapping[int, nn.Module]
    readers: Mapping[nn.Module, tuple[int, ...]]
    reasons: Mapping[int, str]

    @property
    def device(self) -> torch.device:
        """Where the first layer's keys and values are computed, and where kvcar keeps those of all."""
        # Layers that are quantised as they run have no parameters.
        found = (device_of(module) for module in (next(iter(self.attention.values())), self.decoder))
        return next((device for device in found if device.type != "meta"), torch.device("meta"))


def model_of(model: object, what: str) -> PreTrainedModel:
    """Give the model of transformers that ``model`` is, or that a PeftModel or ``torch.compile`` wraps.

    Args:
        model: what a user gave.
        what: the function that it was given to.

    Raises:
        UnsupportedModelError: it is something else, or cannot generate.
    """
    model = getattr(model, "_orig_mod", model)
    kind = str(getattr(getattr(model, "active_peft_config", None), "peft_type", "")).rpartition(".")[2]
    if kind in _WITH_A_CACHE and what != "detach":
        raise UnsupportedModelError(
            f"the adapter of this {type(model).__name__} ({kind}) is itself a cache of keys and values, which it gives the model in "
            f"place of any other; {what} its get_base_model() to run that without the adapter, or use one of another kind (LoRA)"
        )
    base = getattr(model, "get_base_model", None)
    inner = base() if callable(base) else model
    if isinstance(inner, PreTrainedModel):
        if not isinstance(inner, GenerationMixin):
            raise UnsupportedModelError(
                f"{type(inner).__name__} cannot generate; give {what} the causal language model around it"
            )
        return inner
    hint = " (its attribute model)" if hasattr(model, "model") else ""
    raise UnsupportedModelError(f"{what} takes a model of transformers, got {type(model).__name__}{hint}")


# Modules by their names, as values that hold their keys would keep models alive.
_known: WeakKeyDictionary[nn.Module, _Names] = WeakKeyDictionary()


def find_decoder(model: PreTrainedModel) -> DecoderParts:
    """Find the parts of a model; it is run once over a few tokens, and then known.

    Raises:
        UnsupportedModelError: it does not run over a cache of transformers, or its attention cannot be reached.
    """
    if model in _known:
        try:
            return _known[model].parts(model)
        except AttributeError:
            del _known[model]  # modules were taken out of it
    parts = _Probe(model).parts()
    _known[model] = _Names.of(model, parts)
    return parts


@dataclass(frozen=True)
class _Names:
    """``DecoderParts`` with the names of modules in their places."""

    without_modules: DecoderParts
    entries: tuple[str, ...]
    attention: Mapping[int, str]
    readers: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, model: nn.Module, parts: DecoderParts) -> _Names:
        """Name the modules of ``parts``."""
        names = {id(module): name for name, module in model.named_modules()}
        return cls(
            replace(parts, decoder=_NO_MODULE, entries=(), attention={}, readers={}),
            tuple(names[id(module)] for module in parts.entries),
            {layer: names[id(module)] for layer, module in parts.attention.items()},
            {names[id(module)]: layers for module, layers in parts.readers.items()},
        )

    def parts(self, model: nn.Module) -> DecoderParts:
        """Find the modules by their names."""
        entries = tuple(map(model.get_submodule, self.entries))
        return replace(
            self.without_modules,
            decoder=entries[-1],
            entries=entries,
            attention={layer: model.get_submodule(name) for layer, name in self.attention.items()},
            readers={model.get_submodule(name): layers for name, layers in self.readers.items()},
        )


_NO_MODULE = nn.Identity()


def own_cache_layers(config: PreTrainedConfig) -> list[Any]:
    """Make the layers of a model's own cache, empty.

    Raises:
        UnsupportedModelError: transformers knows no cache for it.
    """
    try:
        cache = DynamicCache(config=config)
    except Exception as error:
        raise UnsupportedModelError(
            f"transformers makes no cache for {type(config).__name__} ({type(error).__name__}: {first_line(error)})"
        ) from error
    return list(cache.layers)


def kind_of(layer: object) -> LayerKind:
    """Say what a layer of a cache of transformers keeps."""
    # A layer that keeps a state beside keys and values of the whole text, as Falcon-H1's do, goes by these.
    beside = getattr(cache_utils, "LinearAttentionAndFullAttentionLayer", DynamicLayer)
    if type(layer) in (DynamicLayer, beside):
        return "full"
    return "sliding" if type(layer) is DynamicSlidingWindowLayer else "own"


def first_line(error: BaseException) -> str:
    """What an error says, shortly."""
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else "no message"


class _ProbeCache(Cache):
    """A model's own cache, which notes what is written to it."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(layers=own_cache_layers(config))
        self.writes: list[tuple[int, Tensor, Tensor]] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write, as the model's own cache does."""
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self.writes.append((layer_idx, keys, values))
        return keys, values


@dataclass
class _Read:
    """One call of attention: by which module, of which layer's keys (None for none of the cache's), with what."""

    module: nn.Module
    layer: int | None
    query_heads: int
    unknown: list[str]


@dataclass
class _Probe:
    """Runs a few tokens and notes who does what.

    Args:
        model: to look at.
    """

    model: PreTrainedModel
    reads: list[_Read] = field(default_factory=list)

    def parts(self) -> DecoderParts:
        """Find everything, or say why not."""
        name = type(self.model).__name__
        _refuse_unloaded(self.model)
        if getattr(self.model.config, "is_encoder_decoder", False):
            raise UnsupportedModelError(
                f"{name} is an encoder-decoder; kvcar compresses the cache of decoder-only models"
            )
        self.cache = _ProbeCache(self.model.config)
        layers = self.cache.layers
        if not any(isinstance(layer, CacheLayerMixin) for layer in layers):
            raise UnsupportedModelError(
                f"{name} keeps states of a fixed size and no keys and values; nothing of it grows, so there is nothing to compress"
            )
        entries = self._run(name)
        kinds: tuple[LayerKind, ...] = tuple(kind_of(layer) for layer in layers)
        written = Counter(layer for layer, _, _ in self.cache.writes)
        shapes, attention, reasons = {}, {}, {}
        for layer, key, value in self.cache.writes:
            reads = [read for read in self.reads if read.layer == layer]
            reason = self._reason(written[layer], key, value, reads)
            if reason is not None:
                reasons[layer] = reason
                continue
            shapes[layer] = LayerShape(key.shape[1], key.shape[3], value.shape[3], reads[0].query_heads)
            attention[layer] = reads[0].module
        readers: dict[nn.Module, tuple[int, ...]] = {}
        for read in self.reads:
            if read.layer is not None:
                readers[read.module] = (*readers.get(read.module, ()), read.layer)
        if not self.cache.writes:
            raise UnsupportedModelError(f"{name} writes no keys and values to the cache that it is given")
        if not self.reads:
            raise UnsupportedModelError(
                f"{name} computes attention in its own code instead of by name (AttentionInterface of transformers), so that it "
                "cannot be reached without patching the model; run it with its own cache, or take a version of transformers that "
                "has brought it to that interface"
            )
        windows = {i: own.sliding_window for i, own in enumerate(layers) if isinstance(own, DynamicSlidingWindowLayer)}
        return DecoderParts(entries[-1], tuple(entries), kinds, windows, shapes, attention, readers, reasons)

    @torch.no_grad()
    def _run(self, name: str) -> list[nn.Module]:
        """Run the tokens; the modules that were given the cache and the inputs, from the outermost on."""
        entries: list[nn.Module] = []

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if any(value is self.cache for value in (*args, *kwargs.values())):
                entries.append(module)

        handles = [
            m.register_forward_pre_hook(note, with_kwargs=True) for m in self.model.modules() if _takes_inputs(m)
        ]
        device = device_of(self.model)
        vocabulary = self.model.config.get_text_config(decoder=True).vocab_size
        ids = torch.full((1, _PROBE_TOKENS), vocabulary // 2, dtype=torch.int64, device=device)
        base = base_of(self.model)
        register(_PROBE, base, _probing)
        _local.probe = self
        try:
            with evaluating(self.model), switched(self.model, _PROBE):
                self.model(input_ids=ids, **cache_argument(self.model, self.cache), use_cache=True)
        except KVCarError:
            raise
        except Exception as error:
            raise UnsupportedModelError(
                f"{name} cannot be run over a cache of transformers ({type(error).__name__}: {first_line(error)})"
            ) from error
        finally:
            _local.probe = None
            for handle in handles:
                handle.remove()
        if not entries:
            raise UnsupportedModelError(
                f"no module of {name} takes a cache of transformers ({' or '.join(CACHE_NAMES)}) beside its inputs: it was written "
                "before there was one, or needs none; run it as it is"
            )
        return entries

    def _reason(self, times: int, key: Tensor, value: Tensor, reads: list[_Read]) -> str | None:
        """Why a layer that was written to cannot be compressed; None where it can."""
        if times > 1:
            return f"writes {times} times in one pass"
        if not reads:
            return "gives attention other keys or values than it gives the cache, so that decoded ones cannot take their place"
        if key.ndim != 4 or key.shape[:3] != value.shape[:3]:
            return (
                f"keeps keys {tuple(key.shape)} and values {tuple(value.shape)}, which are not those of attention heads"
            )
        if key.shape[3] != value.shape[3]:
            return f"has keys of {key.shape[3]} elements and values of {value.shape[3]}, where a plan has one width"
        unknown = sorted({name for read in reads for name in read.unknown})
        return f"asks attention for {', '.join(unknown)}, which kvcar's does not know" if unknown else None


def _refuse_unloaded(model: nn.Module) -> None:
    """Weights on the meta device are nowhere, unless something brings them when they are needed."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.device.type == "meta" and not is_offloaded(module, name):
                raise UnsupportedModelError(f"{type(model).__name__} is not loaded (meta device); load the model first")


class _Local(threading.local):
    probe: _Probe | None = None


_local = _Local()


def _probing(base: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Attention that notes who calls it, with what, and does what the model's own does."""
    function, probe = base_function(base, module), _local.probe
    if probe is not None:
        writes = probe.cache.writes
        several = len({keys.device for _, keys, _ in writes}) > 1
        layers = [n for n, keys, values in writes if _same(keys, key, several) and _same(values, value, several)]
        asked = {name for name, given in kwargs.items() if given is not None} & honoured(base, module)
        unknown = sorted(asked - HONOURED - _HARMLESS)
        probe.reads.append(_Read(module, layers[0] if layers else None, query.shape[1], unknown))
    return function(module, query, key, value, *args, **kwargs)


def _same(written: Tensor, given: Tensor, several: bool) -> bool:
    """Whether a tensor is the one that was written; where layers lie on several devices, it may have been brought to that of another one."""
    if given is written or not several or given.shape != written.shape:
        return given is written
    return torch.equal(given.to(written), written)


def _takes_inputs(module: nn.Module) -> bool:
    """Whether a module's forward takes a cache and is given the inputs; a layer's does not."""
    parameters = inspect.signature(module.forward).parameters
    return "inputs_embeds" in parameters and any(name in parameters for name in CACHE_NAMES)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run a model without dropout; modules that were in training are again afterwards."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def cache_argument(module: nn.Module, cache: Cache) -> dict[str, Any]:
    """Give ``cache`` as the keyword argument that the forward of ``module`` knows it by."""
    parameters = inspect.signature(module.forward).parameters
    return {next((name for name in CACHE_NAMES if name in parameters), CACHE_NAME): cache}
