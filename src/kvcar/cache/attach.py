"""Connecting a model to compressed caches, and disconnecting it again.

``attach`` adds hooks and sets the model's attention implementation to kvcar's stand-in; nothing of the model's class
is changed, and ``detach`` leaves the model as it was found.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ..bundle import Bundle
from ..errors import AttachError, UnsupportedModelError
from ..kernels.rotary import RotaryTable
from ..models.rotary_probe import RotaryProbe
from ..models.structure import find_decoder
from ..models.uncompiled import uncompiled
from .attention import stand_in_for
from .cache import KVCarCache
from .coder import PageCoder
from .current import Current, set_current
from .prefill import PREFILL_CHUNK_TOKENS

_PREPARE = "_prepare_cache_for_generation"

_attached: WeakKeyDictionary[nn.Module, Attachment] = WeakKeyDictionary()


class Attachment:
    """The connection between one model and its compressed caches; a context manager that detaches at its end.

    Made by ``attach``. While it lasts, ``model.generate(...)`` uses a fresh ``KVCarCache`` unless it is given a cache
    (any cache of transformers works as before) or told not to use one. Long prompts are prefilled in chunks.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        bundle: Bundle,
        window: int | None,
        prefill_chunk: int,
    ) -> None:
        bundle.check_model(model)
        prepare = getattr(type(model), _PREPARE, None)
        if prepare is None:
            raise UnsupportedModelError(
                f"this version of transformers prepares caches in a way kvcar does not know ({_PREPARE} is gone); "
                "install a version that kvcar's requirements name"
            )
        self.model, self.bundle = model, bundle
        self._window, self._prefill_chunk = window, prefill_chunk
        self._checked = {id(bundle): bundle}
        self._coders: dict[int, PageCoder] = {}
        self._tables: dict[int, RotaryTable] = {}
        self._wanted: set[int] = set()
        self._current = Current()
        self._parts = find_decoder(model, bundle.plan.geometry.layers)
        self.new_cache()  # a bad window is told now, not in the first generate
        self._base = str(model.config.get_text_config()._attn_implementation)
        stand_in = stand_in_for(self._base)
        self._probe = RotaryProbe(self._parts.decoder)
        self._probe.listening = False
        self._handles = [*self._probe.handles, *self._hook_decoder(), *map(self._hook_attention, self._parts.attention)]
        for module in self._parts.attention:
            set_current(module, self._current)
        self._set_attention(stand_in)
        # Only this instance: `generate` asks it for a cache, and gets a compressed one by default.
        model.__dict__[_PREPARE] = partial(_prepare_cache, self, partial(prepare, model))

    def new_cache(self) -> KVCarCache:
        """An empty cache for this model, with the options given to ``attach``."""
        return KVCarCache(self.bundle, window=self._window)

    def detach(self) -> None:
        """Restore the model; caches made meanwhile can no longer be used with it. Doing it twice is harmless."""
        if _attached.get(self.model) is not self:
            return
        for handle in self._handles:
            handle.remove()
        for module in self._parts.attention:
            set_current(module, None)
        self._set_attention(self._base)
        self.model.__dict__.pop(_PREPARE, None)
        del _attached[self.model]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    # What caches ask (the ``Host`` of ``cache.py``)

    def check_bundle(self, bundle: Bundle) -> None:
        """Refuse a bundle of another model; checked once each."""
        if id(bundle) not in self._checked:
            bundle.check_model(self.model)
            self._checked[id(bundle)] = bundle

    def coder(self, bundle: Bundle) -> PageCoder:
        """The bundle made ready for this model's device and dtype; made once each."""
        if id(bundle) not in self._coders:
            self._coders[id(bundle)] = PageCoder(bundle, self._parts.device, self.model.dtype)
        return self._coders[id(bundle)]

    def rotary(self, layer: int) -> RotaryTable | None:
        """How a layer rotates its keys; known from its first pass on."""
        return self._tables.get(layer)

    # Hooks

    def _hook_decoder(self) -> list[RemovableHandle]:
        decoder = self._parts.decoder
        return [
            decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True),
            decoder.register_forward_hook(self._after_decoder, with_kwargs=True),
        ]

    def _hook_attention(self, module: nn.Module) -> RemovableHandle:
        return module.register_forward_pre_hook(self._before_attention, with_kwargs=True)

    def _before_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._begin(module, args, kwargs, torch.compiler.is_compiling())

    @uncompiled
    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], compiled: bool) -> None:
        cache = _given_cache(args, kwargs)
        self._current.cache = None
        if cache is None:
            return
        if torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters()) and module.training:
            raise UnsupportedModelError(
                "a compressed cache is for inference; call model.eval() and use torch.no_grad()"
            )
        inputs = next((kwargs[k] for k in ("input_ids", "inputs_embeds") if kwargs.get(k) is not None), None)
        inputs = args[0] if inputs is None else inputs
        mask = kwargs.get("attention_mask")
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
            raise UnsupportedModelError("a compressed cache takes 2-D attention masks (left padding) only")
        _refuse_capture(inputs)
        self._wanted = self._unknown_rotations(cache)
        self._probe.listening = bool(self._wanted)
        if compiled and self._probe.listening:
            self._learn_rotation_ahead(inputs)
        cache.begin_pass(self, inputs.shape[0], inputs.shape[1], mask, kwargs.get("position_ids"))
        self._current.cache = cache

    def _before_attention(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del args
        # A compiler traces this far, and is not interrupted once all is known.
        if self._probe.listening:
            self._learn_rotation(module, kwargs)

    @uncompiled
    def _learn_rotation(self, module: nn.Module, kwargs: dict[str, Any]) -> None:
        layer = getattr(module, "layer_idx", None)
        if layer in self._wanted:
            self._tables[layer] = self._probe.table(kwargs.get("position_embeddings"))

    def _learn_rotation_ahead(self, inputs: Tensor) -> None:
        """By a pass over one token without a cache, as a pass that is compiled cannot be looked into."""
        given = {"inputs_embeds" if inputs.is_floating_point() else "input_ids": inputs[:1, :1]}
        with torch.no_grad():
            self._parts.decoder(**given, use_cache=False)
        self._probe.listening = False

    def _unknown_rotations(self, cache: KVCarCache) -> set[int]:
        plan = cache.plan
        return set(plan.coded_layers) - self._tables.keys() if plan.geometry.rotary else set()

    @uncompiled
    def _after_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
        del module, args, kwargs, output
        self._probe.forget()
        cache, self._current.cache = self._current.cache, None
        if cache is not None:
            cache.end_pass()

    def _set_attention(self, implementation: str) -> None:
        """Of the decoder only: a vision tower beside it keeps its own."""
        decoder = self._parts.decoder
        (decoder if isinstance(decoder, PreTrainedModel) else self.model).set_attn_implementation(implementation)


def attach(
    model: PreTrainedModel,
    bundle: Bundle | str | Path,
    window: int | None = None,
    prefill_chunk: int = PREFILL_CHUNK_TOKENS,
) -> Attachment:
    """Let ``model`` run over compressed caches made from ``bundle``.

    Args:
        model: a causal language model of transformers, using sdpa or eager attention.
        bundle: a bundle fitted for this model, or its folder.
        window: recent tokens kept exact; see ``KVCarCache``.
        prefill_chunk: most tokens of a prompt that ``generate`` computes at once.

    Returns:
        The attachment; ``detach()`` it, or use it as a context manager.

    Raises:
        AttachError: the model is attached already.
        ModelMismatchError: the bundle was fitted for another model.
        UnsupportedModelError: the model's structure is not one kvcar can serve.
    """
    if model in _attached:
        raise AttachError("this model is attached already; detach it first")
    bundle = bundle if isinstance(bundle, Bundle) else Bundle.load(bundle)
    attachment = Attachment(model, bundle, window, prefill_chunk)
    _attached[model] = attachment
    return attachment


def attachment_of(model: PreTrainedModel) -> Attachment | None:
    """The attachment of ``model``, None where it is not attached."""
    return _attached.get(model)


def detach(model: PreTrainedModel) -> None:
    """Detach ``model``; raises AttachError if it is not attached."""
    if model not in _attached:
        raise AttachError("this model is not attached, so there is nothing to detach")
    _attached[model].detach()


def _given_cache(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> KVCarCache | None:
    given = kwargs.get("past_key_values")
    if given is None:
        given = next((a for a in args if isinstance(a, KVCarCache)), None)
    return given if isinstance(given, KVCarCache) else None


def _refuse_capture(inputs: Tensor) -> None:
    if inputs.is_cuda and torch.cuda.is_current_stream_capturing():
        raise UnsupportedModelError(
            "a step over a compressed cache cannot be captured as one CUDA graph: a replay would not store its tokens; "
            "torch.compile(model, mode='reduce-overhead') captures what lies between attention"
        )


def _prepare_cache(
    attachment: Attachment, original: Any, generation_config: Any, model_kwargs: dict[str, Any], *rest: Any
) -> None:
    """``generate``'s cache preparation: a compressed cache by default, and chunked prefill with one."""
    if generation_config.cache_implementation == attachment.model.generation_config.cache_implementation:
        # The checkpoint's own preference, not the caller's: attaching outweighs it.
        generation_config.cache_implementation = None
    wants_own = generation_config.cache_implementation is not None or generation_config.use_cache is False
    if model_kwargs.get("past_key_values") is None and not wants_own:
        model_kwargs["past_key_values"] = attachment.new_cache()
    compressed = isinstance(model_kwargs.get("past_key_values"), KVCarCache)
    # transformers cuts token ids into chunks, not embeddings.
    if compressed and generation_config.prefill_chunk_size is None and model_kwargs.get("inputs_embeds") is None:
        generation_config.prefill_chunk_size = attachment._prefill_chunk
    original(generation_config, model_kwargs, *rest)
