"""Connecting a model to compressed caches, and disconnecting it again.

``attach`` adds hooks and sets the model's attention implementation to kvcar's stand-in; nothing of the model's class
is changed, and ``detach`` leaves the model as it was found.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self, SupportsIndex
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode

from ..bundle import Bundle
from ..errors import AttachError, CacheStateError, InputError, UnsupportedModelError
from ..geometry import BFLOAT16_BYTES
from ..kernels.backend import backend_for
from ..kernels.rotary import RotaryTable
from ..models.interface import base_of, implementation_of, stood_in_for, switch
from ..models.structure import (
    CACHE_NAME,
    CACHE_NAMES,
    TRANSFORMERS_VERSION,
    cache_argument,
    find_decoder,
    model_of,
    own_cache_layers,
)
from ..models.weights import active_adapters, device_of, weights_state
from ..progress import OnProgress, counter, silent
from ..sizes import size_in_words, stored_bytes
from . import guard
from .attention import Current, is_attached, set_current, stand_in_for, uncompiled
from .cache import KVCarCache
from .coder import PageCoder
from .encode import stored_plainly
from .masks import padding_mask, text_positions

PREFILL_CHUNK_TOKENS = 512
_LOGGED_TOKENS = 4096
_PREPARE = "_prepare_cache_for_generation"
# Before 5.23 a prompt that is cut into chunks begins at position 0, whatever the cache has.
_CHUNKS_AFTER_A_PAST = TRANSFORMERS_VERSION >= (5, 23)
_log = logging.getLogger("kvcar")

# Weak both ways: the model's own hooks keep an attachment alive, so that a model that is dropped takes it along.
_attached: WeakKeyDictionary[nn.Module, weakref.ref[Attachment]] = WeakKeyDictionary()
_attaching = threading.Lock()


class Attachment:
    """The connection between one model and its compressed caches; a context manager that detaches at its end.

    Made by ``attach``. While it lasts, ``model.generate(...)`` uses a fresh ``KVCarCache`` unless it is given a cache
    (any cache of transformers works as before) or asked not to use one. Long prompts are prefilled in chunks.
    """

    def __init__(self, model: PreTrainedModel, bundle: Bundle, window: int | None, prefill_chunk: int) -> None:
        bundle.check_model(model)
        prepare = getattr(type(model), _PREPARE, None)
        if prepare is None:
            raise UnsupportedModelError(
                f"this version of transformers prepares caches in a way kvcar does not know ({_PREPARE} is gone); "
                "install a version that kvcar's requirements name"
            )
        self.model, self.bundle = model, bundle
        self._window, self._prefill_chunk = window, prefill_chunk
        self._checked = {bundle.digest}
        self._weights = self._weights_now()
        self._coders: dict[str, PageCoder] = {}
        self._current = Current()
        self._parts = find_decoder(model)
        if any(is_attached(module) for module in self._parts.readers):
            raise AttachError("layers of this model are part of another one that is attached; detach that first")
        types = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ()
        # Masks of layers that keep everything show all of the padding.
        first = next(iter(bundle.plan.geometry.codable_groups), ())
        self._codable = {types[layer] for layer in first if layer < len(types)}
        self.new_cache()  # a bad window is refused now, not in the first generate
        self._stand_in = stand_in_for(base_of(self._parts.decoder))
        self._stood_in_for = stood_in_for(self._parts.decoder)
        self._rotations, expected = guard.look_at(model, bundle)
        self._handles = [
            *(m.register_forward_pre_hook(self._before_entry, with_kwargs=True) for m in self._parts.entries[:-1]),
            self._parts.decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True),
            self._parts.decoder.register_forward_hook(self._after_decoder, with_kwargs=True, always_call=True),
        ]
        for module, layers in self._parts.readers.items():
            set_current(module, self._current, layers)
        self._switch_back = switch(self._parts.decoder, self._stand_in)
        # The checkpoint's own preference, which attaching outweighs; what a caller of `generate` asks for stays.
        self._own_implementation = model.generation_config.cache_implementation
        model.generation_config.cache_implementation = None
        # Only this instance: `generate` asks it for a cache, and gets a compressed one by default.
        model.__dict__[_PREPARE] = partial(_prepare_cache, self, partial(prepare, model))
        if expected is not None:
            try:
                guard.check_against(model, bundle, expected)
            except BaseException:
                self._restore()
                raise

    def new_cache(self) -> KVCarCache:
        """Make an empty cache for this model, with the window given to ``attach``."""
        return KVCarCache(self.bundle, window=self._window)

    def detach(self) -> None:
        """Restore the model; caches made meanwhile go on once it is attached again. Doing it twice is harmless.

        Raises:
            AttachError: another thread is in a pass of the model.
        """
        if attachment_of(self.model) is self:
            self._current.close()
            self._restore()
            del _attached[self.model]

    def _restore(self) -> None:
        """Take away all that was added to the model."""
        for handle in self._handles:
            handle.remove()
        for module in self._parts.readers:
            set_current(module, None)
        self._switch_back()
        self.model.generation_config.cache_implementation = self._own_implementation
        self.model.__dict__.pop(_PREPARE, None)

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        """Refuse copies and pickles of an attached model."""
        return self._current.__reduce_ex__(protocol)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def __str__(self) -> str:
        """One line for the log: how much smaller, what the codecs take, what runs the kernels, what stays exact."""
        plan = self.bundle.plan
        tokens = min(_LOGGED_TOKENS, plan.geometry.max_positions)
        size = size_in_words(plan, tokens, stored_bytes(plan, tokens, BFLOAT16_BYTES))
        exact = sorted(set(range(plan.geometry.layers)) - set(plan.coded_layers))
        return (
            f"{type(self.model).__name__}: at {tokens:,} tokens {size}; codecs of "
            f"{self.bundle.codec_bytes / 1e6:.1f} MB, kernels: {backend_for(self._parts.device)}, exact layers: "
            + (", ".join(map(str, exact)) or "none")
            + (f"; attention is kvcar's own, not {self._stood_in_for}" if self._stood_in_for else "")
        )

    # What caches ask (the ``Host`` of ``cache.py``)

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        return self.model.dtype

    def check_bundle(self, bundle: Bundle) -> None:
        """Refuse a bundle of another model; checked once each."""
        if bundle.digest not in self._checked:
            bundle.check_model(self.model)
            self._checked.add(bundle.digest)

    def check_weights(self) -> None:
        """Refuse a model whose weights or adapters are no longer those that it was attached with.

        Raises:
            ModelMismatchError: they are other weights than those that the bundle was fitted for.
            AttachError: they were written to, or put in another place.
        """
        if self._weights_now() == self._weights:
            return
        self.bundle.check_model(self.model)
        on = ", ".join(active_adapters(self.model)) or "none"
        raise AttachError(
            f"weights or rotary frequencies of {type(self.model).__name__} were written to, moved or replaced since it was attached "
            f"(adapters that are on: {on}); where they still are what the bundle was fitted for, detach the model and attach it again"
        )

    def _weights_now(self) -> tuple[object, ...]:
        return weights_state(self.model, rotation=self.bundle.plan.geometry.rotary)

    def coder(self, bundle: Bundle) -> PageCoder:
        """Give the bundle made ready for this model's device and dtype; made once each."""
        if bundle.digest not in self._coders:
            self._coders[bundle.digest] = PageCoder(bundle, self._parts.device, self.model.dtype)
        return self._coders[bundle.digest]

    def rotary(self, layer: int) -> RotaryTable | None:
        """Say how a layer rotates its keys; None where it does not."""
        return self._rotations.get(layer)

    def own_layers(self) -> list[Any]:
        """Make the layers of the model's own cache, empty; raises AttachError where its config has others by now."""
        layers, expected = own_cache_layers(self.model.config), self.bundle.plan.geometry.layers
        if len(layers) != expected:
            raise AttachError(
                f"the config of {type(self.model).__name__} has {len(layers)} layers, and had {expected} when it was attached; detach "
                "the model and attach it with a bundle for what it is now"
            )
        return layers

    # Hooks

    def _before_entry(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A module around the decoder may make the decoder's mask: what it was given itself says more."""
        if _given_cache(args, kwargs) is not None:
            self._note_mask(module, kwargs.get("attention_mask"))

    @uncompiled
    def _note_mask(self, module: nn.Module, mask: object) -> None:
        plain = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        # Nothing is left of a pass that failed before it came to the decoder.
        if plain is not None or module is self._parts.entries[0]:
            self._current.mask = plain

    def _before_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # A compiled pass over another cache has nothing of kvcar's in it, and may be one graph.
        if not torch.compiler.is_compiling() or _given_cache(args, kwargs) is not None:
            self._begin(module, args, kwargs)

    @uncompiled
    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = _given_cache(args, kwargs)
        given = [kwargs[k] for k in ("input_ids", "inputs_embeds") if kwargs.get(k) is not None] or args
        if cache is None:
            self._current.enter(
                None, given[0].shape[1] if given and isinstance(given[0], Tensor) and given[0].ndim > 1 else 0
            )
            return
        inputs = given[0]
        self._refuse_switched()
        if kwargs.get("output_attentions", self.model.config.get_text_config().output_attentions):
            raise UnsupportedModelError(
                "attention weights are never formed with a compressed cache; leave output_attentions off"
            )
        if torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters()) and module.training:
            raise UnsupportedModelError(
                "a compressed cache is for inference; call model.eval() and use torch.no_grad()"
            )
        if cache.tokens == 0 or inputs.shape[1] > 1:
            self.check_weights()
        outer, self._current.mask = self._current.mask, None
        mask = padding_mask(kwargs.get("attention_mask"), outer, inputs.shape[:2], cache.tokens, self._codable)
        _refuse_capture(inputs)
        with stored_plainly(self._parts.device):
            cache.begin_pass(self, inputs.shape[0], inputs.shape[1], mask, text_positions(kwargs.get("position_ids")))
        try:
            self._current.enter(cache, inputs.shape[1])
        except AttachError:
            cache.leave_pass()
            raise

    def _refuse_switched(self) -> None:
        """Another implementation would not read the compressed past."""
        now = implementation_of(self._parts.decoder)
        if now != self._stand_in:
            raise AttachError(
                f"the model's attention was switched to {now!r} while it was attached, so that the compressed past would "
                "not be read; detach it, switch, and attach it again"
            )

    def _after_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
        del module
        if not torch.compiler.is_compiling() or _given_cache(args, kwargs) is not None:
            self._end(_given_cache(args, kwargs), output)

    @uncompiled
    def _end(self, cache: KVCarCache | None, output: object) -> None:
        if not self._current.leave(cache):
            if cache is not None and output is not None:
                raise CacheStateError(
                    "another pass over this cache ran within this one, whose tokens are lost; reset the cache, and give each "
                    "pass a cache of its own (cache.fork() shares pages)"
                )
            return
        if cache is None:
            return
        try:
            if output is not None:  # of a pass that failed there is none
                cache.end_pass()
        finally:
            cache.leave_pass()


def attach(
    model: PreTrainedModel,
    bundle: Bundle | str | Path,
    window: int | None = None,
    prefill_chunk: int = PREFILL_CHUNK_TOKENS,
) -> Attachment:
    """Let ``model`` run over compressed caches made from ``bundle``.

    Args:
        model: a causal language model of transformers, using sdpa or eager attention.
        bundle: a bundle fitted for this model, its folder, or its id on the hub.
        window: recent tokens kept exact; see ``KVCarCache``.
        prefill_chunk: tokens of a prompt that ``generate`` computes at once.

    Returns:
        The attachment; ``detach()`` it, or use it as a context manager.

    Raises:
        AttachError: the model is attached already.
        ModelMismatchError: the bundle was fitted for another model.
        UnsupportedModelError: the model's structure is not one kvcar supports.
        InputError: the window is no multiple of the page size, or no token would be computed at once.
    """
    if type(prefill_chunk) is not int or prefill_chunk < 1:
        raise InputError(f"prefill_chunk must be at least 1 token, got {prefill_chunk!r}")
    model = model_of(model, "attach")
    bundle = bundle if isinstance(bundle, Bundle) else Bundle.from_pretrained(bundle)
    # What is learned and tried here holds for passes outside of autocast, too.
    device = model.device.type if torch.amp.is_autocast_available(model.device.type) else "cpu"
    with _attaching, torch.autocast(device, enabled=False):
        if attachment_of(model) is not None:
            raise AttachError("this model is attached already; detach it first")
        attachment = Attachment(model, bundle, window, prefill_chunk)
        _attached[model] = weakref.ref(attachment)
    _log.info("attached %s", attachment)
    return attachment


def attachment_of(model: PreTrainedModel) -> Attachment | None:
    """Find the attachment of ``model``; None where it is not attached."""
    reference = _attached.get(model)
    return None if reference is None else reference()


def detach(model: PreTrainedModel) -> None:
    """Detach ``model``; raises AttachError if it is not attached."""
    model = model_of(model, "detach")
    attachment = attachment_of(model)
    if attachment is None:
        raise AttachError("this model is not attached, so there is nothing to detach")
    attachment.detach()


@torch.no_grad()
def prefill(
    model: PreTrainedModel,
    cache: Cache,
    ids: Tensor,
    chunk: int = PREFILL_CHUNK_TOKENS,
    on_progress: OnProgress = silent,
) -> None:
    """Feed ``ids`` int64 ``[B, tokens]`` to ``model`` over ``cache``, ``chunk`` tokens at once, just for the cache."""
    count = counter(on_progress, "prefill", ids.shape[1])
    for part in ids.to(device_of(model)).split(chunk, dim=1):
        model(input_ids=part, **cache_argument(model, cache), use_cache=True, logits_to_keep=1)
        count(part.shape[1])


def _given_cache(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> KVCarCache | None:
    return next((a for a in (*map(kwargs.get, CACHE_NAMES), *args) if isinstance(a, KVCarCache)), None)


def _refuse_capture(inputs: Tensor) -> None:
    if inputs.is_cuda and torch.cuda.is_current_stream_capturing():
        raise UnsupportedModelError(
            "a step over a compressed cache cannot be captured as one CUDA graph: a replay would not store its tokens; "
            "torch.compile(model, mode='reduce-overhead') captures what lies between attention"
        )


def _refuse_known_prompt(cache: KVCarCache, model_kwargs: Mapping[str, Any]) -> None:
    """Tokens that a filled cache has are left out of a prompt, which must have more."""
    if model_kwargs.get("inputs_embeds") is not None:
        return
    # Both are of the whole prompt where ``generate`` made them; positions that a caller gave may be of its end alone.
    mask, positions = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
    whole = mask if isinstance(mask, Tensor) else positions
    if not isinstance(whole, Tensor) or not whole.numel() or (whole is positions and whole.min() > 0):
        return
    if cache.tokens >= whole.shape[-1]:
        raise InputError(
            f"this prompt has {whole.shape[-1]} tokens, and the cache has {cache.tokens} already; to go on, give the whole "
            "conversation (what generate returned) with something new at its end; for another prompt, reset the cache or "
            "give a new one"
        )


def _prepare_cache(
    attachment: Attachment, original: Any, generation_config: Any, model_kwargs: dict[str, Any], *rest: Any
) -> None:
    """Prepare the cache of a ``generate``: a compressed one by default, and chunked prefill with one."""
    wants_own = generation_config.cache_implementation is not None or generation_config.use_cache is False
    if model_kwargs.get(CACHE_NAME) is None and not wants_own:
        model_kwargs[CACHE_NAME] = attachment.new_cache()
    cache = model_kwargs.get(CACHE_NAME)
    if isinstance(cache, KVCarCache):
        if generation_config.assistant_early_exit is not None:
            raise UnsupportedModelError(
                "a compressed cache needs all layers of the model in every pass; leave assistant_early_exit off, or use a "
                "smaller model as the assistant"
            )
        cache.settle()
        _refuse_known_prompt(cache, model_kwargs)
    elif cache is not None or generation_config.cache_implementation is not None:
        _log.warning(
            "generate was given %s, which knows nothing of the bundle: kvcar compresses nothing in it; give it "
            "attached.new_cache(), or no cache at all",
            f"a {type(cache).__name__}"
            if cache is not None
            else f"cache_implementation={generation_config.cache_implementation!r}",
        )
    # transformers cuts token ids into chunks, not embeddings. The assistant of an assisted generation gets the same
    # options, and goes on after a past of its own.
    assisted = GenerationMode.ASSISTED_GENERATION in rest
    if (
        isinstance(cache, KVCarCache)
        and generation_config.prefill_chunk_size is None
        and model_kwargs.get("inputs_embeds") is None
        and (_CHUNKS_AFTER_A_PAST or (cache.tokens == 0 and not assisted))
    ):
        generation_config.prefill_chunk_size = attachment._prefill_chunk
    original(generation_config, model_kwargs, *rest)
