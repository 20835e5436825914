"""The side of a compressed cache that a forward pass uses: taking keys and values, giving the past, storing pages."""

from __future__ import annotations

import logging
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..bundle import Bundle
from ..errors import AttachError, CacheStateError, InputError, UnsupportedModelError
from ..kernels.attend import ExactPast, PagedPast, attend
from ..kernels.backend import Backend, backend_for
from ..sizes import coded_tokens
from .coder import Host
from .decoded import DecodedPast
from .encode import encode_oldest, stored_plainly, without_lost
from .finer import FinerPages
from .layer import CodedLayer, CodedStateLayer, mask_sizes, state_options
from .pages import PageStores, PageViews, Since
from .sequence import AttendedWindow, SequenceState, exact_mask, is_causal_mask, sink_places

_log = logging.getLogger("kvcar")


def is_state(layer: Any) -> bool:
    """Whether a layer of a cache keeps a state that every token changes, instead of or beside keys and values."""
    return hasattr(layer, "recurrent_states")


def states_of(layer: Any) -> list[Tensor]:
    """The tensors of such a state."""
    kept = [*_each(layer.conv_states), *_each(layer.recurrent_states)]
    return [tensor for tensor in kept if tensor is not None]


def _each(states: Any) -> list[Tensor | None]:
    """Several states, or the one that versions of transformers before 5.23 have."""
    return list(states.values()) if isinstance(states, dict) else [states]


def _bring(layer: Any, device: torch.device) -> None:
    """Move what an own layer keeps to where the layer computes; a context is loaded to where pages lie."""
    if isinstance(layer, DynamicLayer) and layer.keys is not None and layer.values is not None:
        layer.keys, layer.values = layer.keys.to(device), layer.values.to(device)


_holding = threading.Lock()


class PassCache(Cache):
    """A compressed cache as ``attach``, attention and transformers use it in a forward pass; see ``KVCarCache``."""

    _holder: int | None = None  # the thread that is in a pass

    def __init__(
        self,
        bundle: Bundle | str | Path,
        window: int | None = None,
        keep_decoded: bool = False,
    ) -> None:
        self.bundle = bundle if isinstance(bundle, Bundle) else Bundle.from_pretrained(bundle)
        plan = self.bundle.plan
        self.plan = plan.model_copy(update={"cache": plan.cache.with_window(window)})
        super().__init__(layers=[self._new_layer(layer) for layer in range(self.plan.geometry.layers)])
        self._coded = {layer: self._coded_layer(layer) for layer in self.plan.coded_layers}
        self._host: Host | None = None
        self._keeps_decoded = keep_decoded
        self.backend: Backend | None = None
        self.page_costs: list[Tensor] | None = None
        """Where to note, for measuring, what each page costs that is coded from now on, nats a token ``[B, 1]``."""
        self._clear()

    # What attach calls around and inside a forward pass

    def begin_pass(self, host: Host, batch: int, tokens: int, mask: Tensor | None, positions: Tensor | None) -> None:
        """Get ready for a forward pass over ``tokens`` tokens of ``batch`` sequences.

        Raises:
            CacheStateError: an earlier pass broke off while it stored, another thread is in one, the batch changed, or the
                pass goes beyond the model's positions.
            InputError: the mask is not left padding.
        """
        self._hold()
        try:
            self._begin_pass(host, batch, tokens, mask, positions)
        except BaseException:
            self.leave_pass()
            raise

    def leave_pass(self) -> None:
        """Let other threads use the cache: the pass is over, whatever came of it."""
        self._holder = None

    def _hold(self) -> None:
        with _holding:
            self._refuse_another_thread()
            self._holder = threading.get_ident()

    def _refuse_another_thread(self) -> None:
        others = {thread.ident for thread in threading.enumerate()} - {threading.get_ident()}
        if self._holder is not None and self._holder in others:  # threads that begin have no name yet
            raise CacheStateError(
                "another thread is in a pass over this cache; give each thread a cache of its own (cache.fork() shares pages)"
            )

    def _begin_pass(self, host: Host, batch: int, tokens: int, mask: Tensor | None, positions: Tensor | None) -> None:
        self._refuse_if_broken()
        if batch < 1:
            raise InputError("this pass has no sequence at all; give at least one")
        self._drop_unfinished_pass()
        host.check_bundle(self.bundle)
        coder = host.coder(self.bundle)
        if self._state is None or self._pages is None or self._seen == 0:  # also where a first pass was refused
            self._take_own_layers(host)
            self._model_dtype = host.dtype
            self._state = SequenceState(batch, coder.device)
            self._pages = PageStores(coder)
            self._finer = FinerPages.none(batch, self.plan.page_tokens, coder.device)
        self._refuse_another_dtype(host)
        self._pages.use(coder)
        self._host = host
        if len(self._state.padding) != batch:
            raise CacheStateError(
                f"the cache holds {len(self._state.padding)} sequences, but this pass has {batch}; reset the cache first"
            )
        state = self._state.advance(self._seen, tokens, mask, positions)
        self._check_positions(tokens, state)
        self._next_state = state
        self._pass_tokens = tokens
        self.backend = backend_for(state.padding.device)
        self._forget_masks()
        for layer in self._coded.values():
            layer.open = True

    def end_pass(self) -> None:
        """Store the tokens of the pass; full pages leave the window for all layers at once.

        Raises:
            CacheStateError: a layer stored nothing, or keys or values of all sequences are NaN or infinite; the cache is then
                as it was before the pass.
            AttachError: a layer's attention did not come by here, and so missed the past; the same holds.
        """
        if self._next_state is None:
            return
        with stored_plainly(self._next_state.padding.device):
            self._refuse_silent_layers()
            self._refuse_unread_layers()
            leave = self._leaving(self._seen + self._pass_tokens)
            state = without_lost(self._coded, leave, self._next_state, self.paged_tokens)
            self._broken = True
            self._state, self._next_state = state, None
            if self._coded:
                self._code_oldest(leave)
        self._seen += self._pass_tokens
        for layer in self._coded.values():
            layer.open = False
        self._forget_masks()
        self._free_passed_pages()
        self._broken = False

    def codes(self, layer: int) -> bool:
        """Whether attention of ``layer`` must come through ``past``."""
        return layer in self._coded

    def is_written(self, layer: int) -> bool:
        """Whether a coded layer has the keys and values of the pass under way."""
        return self._coded[layer].pending is not None

    @property
    def paged_tokens(self) -> int:
        """Tokens of each sequence that lie in pages."""
        return 0 if self._pages is None else self._pages.tokens

    def check_given(self, layer: int, queries: int, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
        """Refuse keys and values ``[B, H, T, D]`` for attention that are not those stored, and masks; see ``check_mask``.

        Raises:
            UnsupportedModelError: a model changes them in between.
        """
        stored = self._coded[layer].pending
        if stored is None:
            raise UnsupportedModelError(
                f"attention of layer {layer} is called, and nothing was written to the cache before: the model left the cache out "
                "on the way there (gradient checkpointing in training does); call model.eval(), or "
                "model.gradient_checkpointing_disable()"
            )
        for name, given, own in zip(("keys", "values"), (key, value), stored, strict=True):
            if given is not own and not (given.shape == own.shape and torch.equal(given.to(own), own)):
                raise UnsupportedModelError(
                    f"the {name} that attention of layer {layer} is given, {given.dtype} {tuple(given.shape)}, are not those "
                    f"that the cache was given, {own.dtype} {tuple(own.shape)}: this model changes them in between, which a "
                    "compressed cache cannot honour"
                )
        self.check_mask(mask, layer, queries)

    def check_mask(self, mask: Tensor | None, layer: int, queries: int) -> None:
        """Refuse a mask for attention of a coded layer that is not causal with left padding; looks at each mask once a pass.

        Args:
            mask: ``[B or 1, H or 1, Q, S]``, or None.
            layer: whose keys are read.
            queries: Q, fewer than the tokens of the pass where a model asks for its last tokens alone.

        Raises:
            UnsupportedModelError: it hides other tokens, or adds to scores; or there are more queries than tokens.
        """
        if self._next_state is None:
            return  # the cache was changed in the middle of the pass, which ``past`` tells
        if queries > self._pass_tokens:
            raise UnsupportedModelError(
                f"attention of layer {layer} has {queries} queries in a pass of {self._pass_tokens} tokens, so that a compressed "
                "cache cannot tell at which tokens they stand"
            )
        window = self._window if self.plan.is_windowed(layer) else None
        total, given = self._seen + self._pass_tokens, self._masks_given.get(window)
        if mask is None:
            self._refuse_no_mask(layer, window)
            return
        if mask is given:
            return
        if not is_causal_mask(
            mask.to(self._next_state.padding.device), self._next_state, total - queries, queries, window
        ):
            to = f"all {total} tokens" if window is None else f"{_in_words(window)} of {total}"
            raise UnsupportedModelError(
                f"the mask that attention of layer {layer} is given, {mask.dtype} {tuple(mask.shape)}, is not that of causal "
                f"attention to {to} but padding, which is all that a compressed cache can honour"
            )
        self._masks_given[window] = mask

    def _refuse_no_mask(self, layer: int, window: AttendedWindow | None) -> None:
        """Without a mask a single token sees a window that slides, as the model's own cache keeps no more; nothing else hides tokens."""
        if window is None or self._seen + self._pass_tokens <= window.tokens:
            return
        if self._pass_tokens > 1 or window.chunked:
            raise UnsupportedModelError(
                f"attention of layer {layer} is given no mask, though it attends to {_in_words(window)}; a compressed cache cannot "
                "tell what it is to see"
            )

    def layer_of(self, key: Tensor, value: Tensor) -> int | None:
        """Which coded layer gave ``key`` and ``value`` in the pass under way; another layer may attend with them too."""
        return next((layer for layer, coded in self._coded.items() if coded.gave(key, value)), None)

    def attend(
        self, layer: int, query: Tensor, scaling: float, softcap: float | None, sinks: Tensor | None = None
    ) -> Tensor:
        """Attention of a coded layer over the past and the tokens of the pass under way; ``[B, T, Hq, D]``.

        ``sinks`` ``[Hq]``, where given, is one more score for each query head, that no value belongs to.
        """
        exact, paged = self.past(layer, query.shape[2])
        self._coded[layer].attended = True
        # Pages are decoded in float32, whatever the model computes its products in.
        assert self._next_state is not None
        # A layer may compute on another device than the one that holds all pages.
        device, lost = self._next_state.padding.device, self._next_state.lost
        with torch.autocast(device.type, enabled=False):
            sinks = None if sinks is None else sinks.to(device)
            output = attend(query.to(device), exact, paged, scaling, softcap, self.backend, sinks)
        output = output.transpose(1, 2).contiguous()
        return (output if lost is None else output.masked_fill(lost[:, None, None, None], torch.nan)).to(query.device)

    def past(self, layer: int, queries: int) -> tuple[ExactPast, PagedPast | None]:
        """Give what the queries of the last ``queries`` tokens of the pass under way attend to in a coded layer.

        Raises:
            CacheStateError: the cache was changed in the middle of it.
        """
        if self._next_state is None:
            raise CacheStateError("the cache was changed in the middle of a pass over it; run the pass anew")
        windowed = self.plan.is_windowed(layer)
        exact = self._coded[layer].exact(self._exact_mask(windowed, queries))
        assert self._pages is not None
        if self._pages.tokens == 0:
            return exact, None
        paged = self._paged(layer, self._next_state, queries)
        if paged.tokens == 0:  # of a layer whose window has passed all pages
            return exact, None
        if self._decoded is not None and not windowed:
            return self._decoded.extend(layer, exact.joined(), paged), None
        return exact, paged

    # What transformers calls, and a compiler traces

    @property
    def is_initialized(self) -> bool:
        """Whether there are tokens of an earlier pass, by which some models know their first one."""
        return self._seen > 0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Take the keys and values ``[B, H, T, D]`` of a layer and return what its attention is to be given."""
        if layer_idx not in self._coded:
            _bring(self.layers[layer_idx], key_states.device)
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        # Where attention is compiled, the operator writes them (``attention.attend_layer``).
        if not (torch.compiler.is_compiling() and self._coded[layer_idx].open):
            self.write(layer_idx, key_states, value_states)
        return key_states, value_states

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Add the keys and values ``[B, H, T, D]`` of the pass under way to a coded layer: the one way in.

        Raises:
            AttachError: the model that calls is not attached, so that its attention would miss the past.
            CacheStateError: the layer is written to twice in one pass.
        """
        self._coded[layer].write(key, value, None if self._state is None else self._state.padding.device)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen by a layer, padding included."""
        if torch.compiler.is_compiling() and layer_idx in self._coded:
            return self._seen
        return super().get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset of the mask that transformers would build."""
        if torch.compiler.is_compiling() and layer_idx in self._coded:
            return mask_sizes(self._seen, query_length, self._coded[layer_idx].sliding_window)
        return super().get_mask_sizes(query_length, layer_idx)

    # Inside

    def _new_layer(self, layer: int) -> CodedLayer | DynamicLayer:
        geometry = self.plan.geometry
        if layer in self.plan.coded_layers:
            return CodedLayer(self.plan.sinks, self._sliding_window(layer))
        if layer in geometry.sliding_layers or layer in geometry.windowed_layers:
            return DynamicSlidingWindowLayer(sliding_window=geometry.sliding_window)
        return DynamicLayer()

    def _take_own_layers(self, host: Host) -> None:
        """Layers that stay the model's own are those of its own cache; until a model is known others keep their places."""
        layers = host.own_layers()
        for layer in self.plan.geometry.own_layers:
            self.layers[layer] = layers[layer]
        for layer in self._coded:
            if is_state(layers[layer]):
                own = CodedStateLayer(self.plan.sinks, self._sliding_window(layer), **state_options(layers[layer]))
                self.layers[layer] = self._coded[layer] = own

    def _sliding_window(self, layer: int) -> int:
        return self.plan.geometry.sliding_window if self.plan.is_windowed(layer) else 0

    def _coded_layer(self, layer: int) -> CodedLayer:
        coded = self.layers[layer]
        assert isinstance(coded, CodedLayer)
        return coded

    def _plain_layers(self) -> list[DynamicLayer]:
        """Layers of keys and values that are not coded."""
        return [layer for layer in self.layers if isinstance(layer, DynamicLayer)]

    def _other_layers(self) -> list[Any]:
        """All layers that are not coded."""
        return [layer for index, layer in enumerate(self.layers) if index not in self._coded]

    def _clear(self) -> None:
        self._seen = 0
        self._pass_tokens = 0
        self._model_dtype: torch.dtype | None = None  # of the model that filled it; None where a file does not say
        self._state: SequenceState | None = None
        self._next_state: SequenceState | None = None
        self._pages: PageStores | None = None
        self._finer: FinerPages | None = None
        self._decoded = DecodedPast() if self._keeps_decoded else None
        self._views = {windowed: PageViews(self.plan.sinks) for windowed in (False, True)}
        self._window_finer: tuple[FinerPages, int, FinerPages] | None = None
        self._forget_masks()
        self._broken = False

    def _forget_masks(self) -> None:
        """At the beginning and end of a pass: what attention sees exactly, where windows begin, and which masks were looked at."""
        self._masks: dict[tuple[bool, int], Tensor | None] = {}
        self._pass_since: dict[int, Since] = {}
        self._masks_given: dict[AttendedWindow | None, Tensor] = {}

    def _refuse_if_broken(self) -> None:
        if self._broken:
            raise CacheStateError("an earlier pass was interrupted while it stored its tokens; reset the cache")

    def _refuse_another_dtype(self, host: Host) -> None:
        """Bytes that were stored for one dtype would be read as numbers of another."""
        assert self._pages is not None
        own, now = self._pages.coder, host.coder(self.bundle)
        if self._model_dtype not in (None, host.dtype) or own.device != now.device or own.dtype != now.dtype:
            stored = self._model_dtype or own.dtype
            raise CacheStateError(
                f"the cache was filled in {stored} on {own.device}, and this model computes in {host.dtype} on {now.device}; "
                "reset the cache, or go on with a model in the dtype and on the device that it was filled with"
            )

    def _drop_unfinished_pass(self) -> None:
        """Forget a pass that an exception or an interrupt ended before its tokens were stored.

        Raises:
            CacheStateError: another thread is in it yet, or layers cannot go back.
        """
        self._refuse_another_thread()
        if self._next_state is not None and any(map(is_state, self.layers)):
            raise CacheStateError(
                "an earlier pass was interrupted and layers that keep a state cannot go back; reset the cache"
            )
        self._next_state = None
        for coded in self._coded.values():
            coded.pending = None
            coded.open = False
        for layer in self._plain_layers():
            extra = layer.get_seq_length() - self._seen
            if extra == 0 or (extra < 0 and not layer.is_initialized):
                continue
            if extra < 0 or isinstance(layer, DynamicSlidingWindowLayer):
                raise CacheStateError(
                    "an earlier pass was interrupted and a sliding layer cannot go back; reset the cache"
                )
            layer.crop(-extra)

    def _check_positions(self, tokens: int, state: SequenceState) -> None:
        positions = self.plan.geometry.max_positions
        # Padding takes no position, so the longest sequence decides.
        longest = self._seen + tokens - int(state.offset.min())
        if longest > positions:
            raise CacheStateError(
                f"this pass would end at position {longest}, but the model has {positions} positions; shorten the prompt "
                "or generate fewer tokens"
            )

    def _refuse_silent_layers(self) -> None:
        silent = [layer for layer, coded in self._coded.items() if coded.pending is None]
        if silent:
            raise CacheStateError(
                f"layers {silent} stored nothing in this pass, so their past would be missing; kvcar supports models that "
                "run all layers in every pass"
            )

    def _refuse_unread_layers(self) -> None:
        unread = [layer for layer, coded in self._coded.items() if not coded.attended]
        if unread:
            raise AttachError(
                f"attention of layers {unread} ran past kvcar in this pass, so that their past was not read: their attention modules "
                "were replaced, or call another attention function than the one that the model was attached with; detach the "
                "model and attach it again"
            )

    def _leaving(self, tokens: int) -> int:
        """How many tokens leave the window when ``tokens`` have been seen."""
        assert self._pages is not None
        return max(0, coded_tokens(tokens, self.plan.window, self.plan.page_tokens) - self._pages.tokens)

    def _code_oldest(self, leave: int) -> None:
        """Move the oldest ``leave`` tokens of all layers into pages; those of the pass under way become the window's."""
        assert self._host is not None
        assert self._pages is not None
        assert self._state is not None
        assert self._finer is not None
        start, limit, costs = self._pages.tokens, self.plan.cache.page_cost_limit, None
        coder = self._host.coder(self.bundle)
        if leave:
            given = (self._coded, self._pages, coder, self._state, self._host.rotary, leave)
            costs = encode_oldest(*given, with_costs=limit is not None)
        whole = leave // self.plan.page_tokens
        if costs is not None and self.page_costs is not None and whole and start % self.plan.page_tokens == 0:
            self.page_costs += costs[:, : whole * self.plan.page_tokens].unflatten(1, (whole, -1)).mean(-1).split(1, 1)
        before = self._finer
        self._finer, writes = before.after(costs, start, leave, limit)
        if self._finer.pages and not before.pages:
            _log.info(
                "a page of this text would cost more than %.4f nats a token as codes and is kept exactly, as are others like it; "
                "see finer_page_share()",
                limit,
            )
        places = sink_places(self._state, start, leave, self.plan.sinks)
        for layer, coded in self._coded.items():
            own, passed = self._finer_of(self.plan.is_windowed(layer)), 0
            if own.pages != self._finer.pages:
                passed = self._finer.tokens - own.tokens
            moved = [replace(write, place=write.place - passed) for write in writes] if passed else writes
            coded.store(leave, places, coder.dtype, own.tokens, moved)

    def _finer_of(self, windowed: bool) -> FinerPages:
        """The finer pages that a layer keeps: all, or those that its window, where it has one, has not passed."""
        assert self._finer is not None
        assert self._pages is not None
        store = self._pages.windowed
        if store is None or not windowed:
            return self._finer
        known = self._window_finer
        if known is None or known[0] is not self._finer or known[1] != store.freed_pages:
            known = (self._finer, store.freed_pages, self._finer.from_page(store.freed_pages))
            self._window_finer = known
        return known[2]

    def _free_passed_pages(self) -> None:
        """Free the pages of layers with a window that no later token attends to, unless tokens may be taken back."""
        store = None if self._pages is None else self._pages.windowed
        layers = [layer for layer in self._coded if self.plan.is_windowed(layer)]
        if store is None or not layers or any(self._coded[layer].record_past for layer in layers):
            return
        pages = min(self._first_needed(self._seen), store.tokens) // self.plan.page_tokens
        if pages <= store.freed_pages:
            return
        assert self._state is not None
        with stored_plainly(self._state.padding.device):
            before = self._finer_of(windowed=True).tokens
            store.free(pages)
            for layer in layers:
                self._coded[layer].drop_finer(before - self._finer_of(windowed=True).tokens)
        self._views[True].forget()

    def _first_needed(self, tokens: int) -> int:
        """First token that a token after ``tokens`` others attends to in layers with a window, in any sequence."""
        assert self._state is not None
        next_token = torch.tensor([tokens], device=self._state.padding.device)
        return max(0, int(self._window.since(next_token, self._state.padding).min()))

    @property
    def _window(self) -> AttendedWindow:
        geometry = self.plan.geometry
        return AttendedWindow(geometry.sliding_window, geometry.chunked)

    def _since(self, queries: int) -> Since | None:
        """Where windows of the last ``queries`` tokens of this pass begin; None where all its tokens see back to the first one."""
        assert self._next_state is not None
        total = self._seen + self._pass_tokens
        if total <= self._window.tokens:
            return None
        if queries not in self._pass_since:
            device = self._next_state.padding.device
            first = self._window.since(torch.arange(total - queries, total, device=device), self._next_state.padding)
            largest = total - 1 if self._window.chunked else total - self._window.tokens
            self._pass_since[queries] = Since(first, largest)
        return self._pass_since[queries]

    def _paged(self, layer: int, state: SequenceState, queries: int) -> PagedPast:
        """All pages, as attention of a coded layer reads them."""
        assert self._host is not None
        assert self._pages is not None
        assert self._finer is not None
        coder, rotary, windowed = self._host.coder(self.bundle), self._host.rotary(layer), self.plan.is_windowed(layer)
        given = self._pages.of(windowed), state, coder, rotary, self._finer_of(windowed)
        return self._views[windowed].of(layer, *given, self._since(queries) if windowed else None)

    def _exact_mask(self, windowed: bool, queries: int) -> Tensor | None:
        """Mask over what attention sees exactly; the same for all layers of a group in a pass, so built once."""
        assert self._next_state is not None
        assert self._pages is not None
        if (windowed, queries) not in self._masks:
            since = self._since(queries) if windowed else None
            finer = None if self._finer is None else self._finer_of(windowed)
            before = self._seen + self._pass_tokens - queries
            given = (before, self._pages.tokens, queries, self.plan.sinks, finer)
            mask = exact_mask(self._next_state, *given, since=None if since is None else since.first)
            self._masks[windowed, queries] = mask
        return self._masks[windowed, queries]


def _in_words(window: AttendedWindow) -> str:
    return f"{'a chunk' if window.chunked else 'the last'} of {window.tokens:,} tokens".replace("last of", "last")
