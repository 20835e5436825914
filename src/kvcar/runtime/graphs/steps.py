"""Which passes of a model are replayed, and what is captured for them."""

from __future__ import annotations

import inspect
import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from ...errors import KernelError
from ..cache import KVCarCache
from ..host import Host
from .capture import Capture, Captured, CudaCapture
from .memory import StepMemory, window_room
from .step_cache import StepCache

# Kinds of steps (batch sizes, say) whose memory is kept.
_MOST_KINDS = 4
_FEWEST_PAGES = 8
_TAKEN = {
    "input_ids",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "use_cache",
    "return_dict",
    "logits_to_keep",
}
_log = logging.getLogger("kvcar.graphs")


class StepGraphs:
    """Stands in for a model's ``forward``: replays decode steps over compressed caches, and hands on every other pass.

    A step is captured for tables of pages that have room for more than there are: sizes rise by a fourth to an eighth, and
    one is captured when it is first needed.

    Args:
        model: attached, its ``forward`` not yet replaced.
        host: its attachment.
        capture: how to capture; None captures CUDA graphs.
    """

    def __init__(self, model: PreTrainedModel, host: Host, capture: Capture | None = None) -> None:
        self._forward: Callable[..., Any] = model.forward
        self._names = list(inspect.signature(model.forward).parameters)
        self._model, self._host = model, host
        self._capture = capture or CudaCapture(model.device)
        self._kinds: OrderedDict[tuple[object, ...], _Kind] = OrderedDict()
        self._told: set[str] = set()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward pass."""
        given = dict(zip(self._names, args, strict=False)) | kwargs
        cache = given.get("past_key_values")
        if not isinstance(cache, KVCarCache) or not _is_step(cache, given):
            return self._forward(*args, **kwargs)
        reason = _refuses_model(self._model) or _refuses(cache, given, self._host, self._model.dtype)
        if reason is None:
            try:
                return self._replayed(cache, given)
            except NotServed as error:
                reason = str(error)
        self._tell(reason)
        return self._forward(*args, **kwargs)

    def _replayed(self, cache: KVCarCache, kwargs: Mapping[str, Any]) -> CausalLMOutputWithPast:
        token_ids: Tensor = kwargs["input_ids"]
        kind = self._kind(cache)
        cache.begin_pass(self._host, len(token_ids), 1, kwargs.get("attention_mask"), kwargs.get("position_ids"))
        kind.memory.take_in(cache)
        kind.memory.token_ids.copy_(token_ids)
        captured = kind.step_for(cache)
        captured.replay()
        cache.end_written_step()
        # Cloned, as the next replay writes it again.
        return CausalLMOutputWithPast(logits=captured.output.clone(), past_key_values=cache)  # pyright: ignore[reportArgumentType]

    def _kind(self, cache: KVCarCache) -> _Kind:
        chosen = cache.attend_pages
        pages = chosen if chosen is None or isinstance(chosen, int) else tuple(chosen)
        key = (id(cache.bundle), cache.plan.window, cache.batch_size, pages)
        if key not in self._kinds:
            self._kinds[key] = _Kind(cache, self._host, self._model.dtype, self._forward, self._capture)
            if len(self._kinds) > _MOST_KINDS:
                self._kinds.popitem(last=False)
        self._kinds.move_to_end(key)
        return self._kinds[key]

    def _tell(self, reason: str) -> None:
        if reason not in self._told:
            self._told.add(reason)
            _log.warning("decode steps run uncaptured: %s", reason)


class NotServed(KernelError):
    """A step that cannot be captured."""


class _Kind:
    """Steps of one bundle, window and batch: their memory, and what was captured for each size of the table of pages."""

    def __init__(
        self, cache: KVCarCache, host: Host, dtype: torch.dtype, forward: Callable[..., Any], capture: Capture
    ) -> None:
        self._bundle = cache.bundle  # kept, so that its id stays its own
        self._host, self._dtype, self._forward, self._capture = host, dtype, forward, capture
        self._coder = host.coder(cache.bundle)
        self.memory = StepMemory(cache, self._coder.dtype, self._coder.device)
        self._steps: dict[int, tuple[StepCache, Captured]] = {}
        self._refused: str | None = None

    def step_for(self, cache: KVCarCache) -> Captured:
        """What was captured for as many pages as ``cache`` has, led to its pages; captures it where it was not yet."""
        if self._refused is not None:
            raise NotServed(self._refused)
        pages = table_pages(cache.pages)
        summaries, known = cache.summaries, self._steps.get(pages)
        step = (
            StepCache(self.memory, self._host, self._coder, pages, summaries, self._dtype)
            if known is None
            else known[0]
        )
        step.point_at(cache.arenas, summaries)
        if known is None:
            known = self._steps[pages] = step, self._captured(step)
        return known[1]

    def _captured(self, step: StepCache) -> Captured:
        try:
            # Ordinary tensors, whatever mode the first step is taken in.
            with torch.inference_mode(False), torch.no_grad():
                return self._capture(lambda: self._run(step))
        except KernelError as error:
            self._refused = str(error)
            raise NotServed(self._refused) from error

    def _run(self, step: StepCache) -> Tensor:
        positions = step.begin()
        given = {"input_ids": self.memory.token_ids, "position_ids": positions, "past_key_values": step}
        return self._forward(**given, use_cache=True).logits


def table_pages(pages: int) -> int:
    """Pages that the table of a step has room for, when a sequence has ``pages``: at most a fourth more, or 8."""
    if pages <= _FEWEST_PAGES:
        return _FEWEST_PAGES
    quarter = 1 << ((pages - 1).bit_length() - 3)
    return -(-pages // quarter) * quarter


def _is_step(cache: KVCarCache, kwargs: Mapping[str, Any]) -> bool:
    token_ids = kwargs.get("input_ids")
    return isinstance(token_ids, Tensor) and token_ids.shape[1:] == (1,) and cache.tokens > 0


def _refuses_model(model: PreTrainedModel) -> str | None:
    """Why no step of ``model``, as it is used now, can be captured, None if some can."""
    if model.training:
        return "the model is in training mode; call model.eval()"
    if torch.is_grad_enabled():
        return "gradients are enabled; use torch.no_grad()"
    if torch.is_autocast_enabled(model.device.type):
        return "autocast is on, which would be captured too"
    return None


def _refuses(cache: KVCarCache, kwargs: Mapping[str, Any], host: Host, dtype: torch.dtype) -> str | None:
    """Why a decode step over ``cache`` cannot be captured, None if it can; ``dtype`` is the model's."""
    unknown = sorted(name for name in kwargs.keys() - _TAKEN if kwargs[name] is not None and kwargs[name] is not False)
    if unknown or kwargs.get("return_dict") is False or kwargs.get("use_cache") is False:
        return f"the pass is asked for {', '.join(unknown) or 'another kind of output'}"
    if len(cache.coded_layers) < len(cache.layers):
        return "some layers are not coded, and their caches grow"
    if cache.attend_pages is not None and cache.plan.window == 0:
        return "pages are chosen while one is partly filled (attend_pages without a window)"
    if cache.plan.window == 0 and host.coder(cache.bundle).dtype != dtype:
        return "without a window tokens are coded at once, and what is held exactly would round them first"
    if cache.keeps_decoded:
        return "decoded pages are kept (keep_decoded)"
    if cache.tokens - cache.paged_tokens >= window_room(cache.plan):
        return "the cache was loaded with more tokens in its window than it will have"
    if cache.plan.geometry.rotary and any(host.rotary(layer) is None for layer in cache.coded_layers):
        return "how the model rotates its keys is not known before its first pass"
    return None
