"""The compressed cache itself: what ``model.generate(..., past_key_values=...)`` is given."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Any, NoReturn, SupportsIndex

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..bundle import Bundle
from ..errors import CacheStateError, InputError
from ..kernels.attend import ExactPast, PagedPast, attend
from ..kernels.backend import Backend, backend_for
from ..registry import Registry
from ..sizes import coded_tokens
from .coder import Host
from .decoded import DecodedPast
from .encode import encode_oldest, refuse_non_finite, stored_plainly
from .layer import CodedLayer
from .pages import PageStore, PageViews
from .sequence import SequenceState, exact_mask, sink_places

CONTEXT_STORE: Registry[Callable[..., Any]] = Registry("way to store contexts (import kvcar.context.stored)")
""""save" and "load" of ``kvcar.context``, which registers them; the cache itself knows nothing of files."""


class KVCarCache(Cache):
    """A KV cache whose old tokens are stored as packed codes.

    Use it with a model that ``kvcar.attach`` has connected: ``model.generate(..., past_key_values=cache)``. The first
    ``sinks`` tokens and the most recent ``window`` stay exact; everything between lies in pages.

    Args:
        bundle: a bundle or the folder of one.
        window: recent tokens kept exact, a multiple of the plan's page size; None takes the plan's; 0 codes every
            token as soon as its forward pass is over, as the paper does.
        keep_decoded: decode pages once and keep what comes out, for measuring quality only: the numbers are the same (but
            for the rounding of kernels) and come much faster, but the memory saved is taken back (``stored_bytes`` does
            not count it).

    Raises:
        InputError: the window is no multiple of the page size.
    """

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
        self._clear()

    # What attach calls around and inside a forward pass

    def begin_pass(self, host: Host, batch: int, tokens: int, mask: Tensor | None, positions: Tensor | None) -> None:
        """Get ready for a forward pass over ``tokens`` tokens of ``batch`` sequences.

        Raises:
            CacheStateError: an earlier pass broke off while it stored, the batch changed, or the pass goes beyond
                the model's positions.
            InputError: the mask is not left padding.
        """
        self._refuse_if_broken()
        self._drop_unfinished_pass()
        host.check_bundle(self.bundle)
        self._host = host
        if self._state is None:
            coder = host.coder(self.bundle)
            self._state = SequenceState(batch, coder.device)
            self._pages = PageStore(coder.units, coder.layout.page_bytes, self.plan.page_tokens)
        if len(self._state.padding) != batch:
            raise CacheStateError(
                f"the cache holds {len(self._state.padding)} sequences, but this pass has {batch}; reset the cache first"
            )
        state = self._state.advance(self._seen, tokens, mask, positions)
        self._check_positions(tokens, state)
        self._next_state = state
        self._pass_tokens = tokens
        self.backend = backend_for(state.padding.device)
        self._mask, self._mask_known = None, False
        for layer in self._coded.values():
            layer.open = True

    def end_pass(self) -> None:
        """Store the tokens of the pass; full pages leave the window for all layers at once.

        Raises:
            CacheStateError: a layer stored nothing, or keys or values are NaN or infinite; the cache is then as it was before
                the pass.
        """
        if self._next_state is None:
            return
        with stored_plainly(self._next_state.padding.device):
            self._refuse_silent_layers()
            leave = self._leaving(self._seen + self._pass_tokens)
            refuse_non_finite(self._coded, leave)
            self._broken = True
            self._state, self._next_state = self._next_state, None
            if self._coded:
                self._code_oldest(leave)
        self._seen += self._pass_tokens
        for layer in self._coded.values():
            layer.open = False
        self._mask, self._mask_known = None, False
        self._broken = False

    def fork(self) -> KVCarCache:
        """Make a cache of the same tokens; the two share pages until one of them writes to a page.

        Raises:
            CacheStateError: an earlier pass broke off while it stored.
        """
        self._refuse_if_broken()
        self._drop_unfinished_pass()
        fork = KVCarCache(self.bundle, self.plan.window, self._keeps_decoded)
        fork._state, fork._seen, fork._host = self._state, self._seen, self._host
        for index, layer in enumerate(self.layers):
            if isinstance(layer, DynamicLayer):
                # Its tensors are replaced, never written to.
                fork.layers[index] = copy(layer)
        if self._pages is None:
            return fork
        fork._pages = self._pages.fork()
        for index, layer in self._coded.items():
            if layer.buffers is not None:
                fork._coded[index].restore(layer.paged, *(side.clone() for side in layer.kept()))
        return fork

    def __deepcopy__(self, memo: dict[int, Any]) -> KVCarCache:
        """Fork: what transformers means by a deep copy of a cache, without a copy of the model or of any page."""
        del memo
        return self.fork()

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        """Refuse to be pickled: a cache belongs to an attached model, and pickles are never read."""
        raise TypeError(
            "a KVCarCache cannot be pickled, as it belongs to an attached model; cache.save(path) and "
            "KVCarCache.load(path, model) write and read it"
        )

    def codes(self, layer: int) -> bool:
        """Whether attention of ``layer`` must come through ``past``."""
        return layer in self._coded

    def attend(self, layer: int, query: Tensor, scaling: float, softcap: float | None) -> Tensor:
        """Attention of a coded layer over the past and the tokens of the pass under way; ``[B, T, Hq, D]``."""
        exact, paged = self.past(layer)
        # Pages are decoded in float32, whatever the model computes its products in.
        with torch.autocast(query.device.type, enabled=False):
            return attend(query, exact, paged, scaling, softcap, self.backend).transpose(1, 2).contiguous()

    def past(self, layer: int) -> tuple[ExactPast, PagedPast | None]:
        """Give what queries of a coded layer attend to in the pass under way."""
        assert self._next_state is not None
        exact = self._coded[layer].exact(self._exact_mask())
        assert self._pages is not None
        if self._pages.tokens == 0:
            return exact, None
        paged = self._paged(layer, self._next_state)
        if self._decoded is not None:
            return self._decoded.extend(layer, exact.joined(), paged), None
        return exact, paged

    # What transformers calls, and a compiler traces

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Take the keys and values ``[B, H, T, D]`` of a layer and return what its attention is to be given."""
        if layer_idx not in self._coded:
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
        self._coded[layer].write(key, value)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen by a layer, padding included."""
        if torch.compiler.is_compiling() and layer_idx in self._coded:
            return self._seen
        return super().get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset of the mask that transformers would build."""
        if torch.compiler.is_compiling() and layer_idx in self._coded:
            return self._seen + query_length, 0
        return super().get_mask_sizes(query_length, layer_idx)

    def reset(self) -> None:
        """Forget all tokens; the cache can be used again, also with another batch size."""
        super().reset()
        self._clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Pick sequences ``beam_idx`` int64 ``[B]`` for beam search."""
        self._map_batch(lambda x: x.index_select(0, beam_idx.to(x.device)))
        for layer in self._plain_layers():
            layer.reorder_cache(beam_idx)  # pyright: ignore[reportArgumentType]  # annotated as a legacy LongTensor

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence ``repeats`` times."""
        self._map_batch(lambda x: x.repeat_interleave(repeats, dim=0))
        for layer in self._plain_layers():
            layer.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep sequences ``indices``."""
        self._map_batch(lambda x: x[indices])
        for layer in self._plain_layers():
            layer.batch_select_indices(indices)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the most recent ``-tokens_to_remove`` tokens (a negative number, as transformers has it).

        Raises:
            CacheStateError: more tokens than there are, or removing would reach into the sinks.
        """
        self._refuse_if_broken()
        self._drop_unfinished_pass()
        removed = -tokens_to_remove
        if removed < 0:
            raise InputError(f"crop takes a negative number of tokens to remove, got {tokens_to_remove}")
        if removed == 0 or self._state is None:
            return
        kept = self._seen - removed
        paged = min(kept, self._pages.tokens) if self._pages else 0
        if kept < 0 or (paged and paged < self._state.padding_most + self.plan.sinks):
            raise CacheStateError(f"cannot remove {removed} of {self._seen} tokens; reset the cache instead")
        for layer in self._plain_layers():
            layer.crop(tokens_to_remove)
        for layer in self._coded.values():
            layer.paged = paged
            layer.crop_window(kept - paged)
        if self._pages is not None:
            self._pages.crop(paged)
        if self._decoded is not None:
            self._decoded.crop(paged)
        self._views.forget()
        self._seen = kept

    def flush_window(self) -> None:
        """Put the tokens of the window through the codec too; later ones fill a window again.

        Raises:
            CacheStateError: keys or values are NaN or infinite, or no model has run over the cache yet.
        """
        self._refuse_if_broken()
        self._drop_unfinished_pass()
        in_window = self._seen - self._pages.tokens if self._pages is not None else 0
        if not self._coded or in_window == 0:
            return
        refuse_non_finite(self._coded, in_window)
        self._refuse_unattached()
        assert self._state is not None
        self._broken = True  # unless all of it succeeds
        with stored_plainly(self._state.padding.device):
            self._code_oldest(in_window)
        self._broken = False

    # What is stored on disk

    def save(self, path: str | Path, *, keep_window: bool = False, token_ids: Tensor | None = None) -> None:
        """Write everything stored to one file, from which ``load`` goes on without a prefill; the cache stays as it is.

        Args, and the errors raised, are those of ``kvcar.context.save_context``.
        """
        CONTEXT_STORE["save"](self, path, keep_window, token_ids)

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: PreTrainedModel,
        bundle: Bundle | str | Path | None = None,
        window: int | None = None,
    ) -> KVCarCache:
        """Read a cache that ``save`` wrote; its codes are those that were saved, bit for bit.

        Args, and the errors raised, are those of ``kvcar.context.load_context``.
        """
        return CONTEXT_STORE["load"](path, model, bundle, window)

    @property
    def batch_size(self) -> int:
        """Sequences in the cache, -1 before the first pass."""
        return -1 if self._state is None else len(self._state.padding)

    @property
    def tokens(self) -> int:
        """Tokens stored of each sequence, padding included; those of a pass under way are not."""
        return self._seen

    @property
    def paged_tokens(self) -> int:
        """Those of them that lie in pages."""
        return 0 if self._pages is None else self._pages.tokens

    @property
    def pages(self) -> int:
        """Pages that hold tokens, of each sequence, a partly filled one counted."""
        return -(-self.paged_tokens // self.plan.page_tokens)

    # Accounting

    def stored_bytes(self) -> int:
        """Bytes of all tensors that hold this cache, unfilled room and position tables included."""
        return sum(self.stored_bytes_by_part().values())

    def stored_bytes_by_part(self) -> dict[str, int]:
        """``stored_bytes`` in parts: pages, exact (sinks and window), plain (layers not coded), tables."""
        state = 0 if self._state is None else self._state.nbytes
        host = self._host if self.paged_tokens else None
        rotaries = set() if host is None else {host.rotary(layer) for layer in self._coded}
        plain = [tensor for layer in self._plain_layers() for tensor in (layer.keys, layer.values)]
        return {
            "pages": 0 if self._pages is None else self._pages.nbytes,
            "exact": sum(layer.nbytes for layer in self._coded.values()),
            "plain": sum(tensor.nbytes for tensor in plain if tensor is not None),
            "tables": state + sum(rotary.table_bytes for rotary in rotaries if rotary is not None),
        }

    # Inside

    def _new_layer(self, layer: int) -> CodedLayer | DynamicLayer:
        geometry = self.plan.geometry
        if layer in self.plan.coded_layers:
            return CodedLayer(self.plan.sinks)
        if layer in geometry.sliding_layers:
            return DynamicSlidingWindowLayer(sliding_window=geometry.sliding_window)
        return DynamicLayer()

    def _coded_layer(self, layer: int) -> CodedLayer:
        coded = self.layers[layer]
        assert isinstance(coded, CodedLayer)
        return coded

    def _plain_layers(self) -> list[DynamicLayer]:
        return [layer for layer in self.layers if isinstance(layer, DynamicLayer)]

    def _clear(self) -> None:
        self._seen = 0
        self._pass_tokens = 0
        self._state: SequenceState | None = None
        self._next_state: SequenceState | None = None
        self._pages: PageStore | None = None
        self._decoded = DecodedPast() if self._keeps_decoded else None
        self._views = PageViews(self.plan.sinks)
        self._mask: Tensor | None = None
        self._mask_known = False
        self._broken = False

    def _refuse_if_broken(self) -> None:
        if self._broken:
            raise CacheStateError("an earlier pass was interrupted while it stored its tokens; reset the cache")

    def _refuse_unattached(self) -> None:
        """A cache that was loaded has not met its model yet, and so cannot rotate keys back."""
        if self._host is None:
            raise CacheStateError(
                "this cache was loaded and its model has not run over it yet, so the window cannot be coded; run the "
                "model over some token first, or save with keep_window=True"
            )

    def _drop_unfinished_pass(self) -> None:
        """Forget a pass that an exception or an interrupt ended before its tokens were stored."""
        self._next_state = None
        for coded in self._coded.values():
            coded.pending = None
            coded.open = False
        for layer in self._plain_layers():
            extra = layer.get_seq_length() - self._seen
            if extra == 0:
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

    def _leaving(self, tokens: int) -> int:
        """How many tokens leave the window when ``tokens`` have been seen."""
        assert self._pages is not None
        return max(0, coded_tokens(tokens, self.plan.window, self.plan.page_tokens) - self._pages.tokens)

    def _code_oldest(self, leave: int) -> None:
        """Move the oldest ``leave`` tokens of all layers into pages; those of the pass under way become the window's."""
        assert self._host is not None
        assert self._pages is not None
        assert self._state is not None
        start = self._pages.tokens
        coder = self._host.coder(self.bundle)
        if leave:
            encode_oldest(self._coded, self._pages, coder, self._state, self._host.rotary, leave)
        places = sink_places(self._state, start, leave, self.plan.sinks)
        for coded in self._coded.values():
            coded.store(leave, places, coder.dtype)

    def _paged(self, layer: int, state: SequenceState) -> PagedPast:
        """All pages, as attention of a coded layer reads them."""
        assert self._host is not None
        assert self._pages is not None
        return self._views.of(layer, self._pages, state, self._host.coder(self.bundle), self._host.rotary(layer))

    def _exact_mask(self) -> Tensor | None:
        """Mask over what attention sees exactly; the same for all layers of a pass, so built once."""
        assert self._next_state is not None
        assert self._pages is not None
        if not self._mask_known:
            given = (self._seen, self._pages.tokens, self._pass_tokens, self.plan.sinks)
            self._mask, self._mask_known = exact_mask(self._next_state, *given), True
        return self._mask

    def _map_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        self._refuse_if_broken()
        self._drop_unfinished_pass()
        self._views.forget()
        if self._state is None:
            return
        with stored_plainly(self._state.padding.device):
            for coded in self._coded.values():
                coded.map_batch(change)
            if self._pages is not None:
                self._pages.map_batch(change)
            if self._decoded is not None:
                self._decoded.map_batch(change)
            self._state = self._state.mapped(change)
