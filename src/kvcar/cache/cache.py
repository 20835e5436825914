"""The compressed cache itself: what ``model.generate(..., past_key_values=...)`` is given, and what a user does with it."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from copy import copy, deepcopy
from pathlib import Path
from typing import Any, NoReturn, SupportsIndex

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from ..bundle import Bundle
from ..errors import CacheStateError, InputError
from ..geometry import BFLOAT16_BYTES
from ..layout import page_layout
from ..registry import Registry
from .encode import stored_plainly, without_lost
from .layer import CodedLayer, CodedStateLayer
from .passes import PassCache, is_state, states_of

CONTEXT_STORE: Registry[Callable[..., Any]] = Registry("way to store contexts (import kvcar.context.stored)")
""""save" and "load" of ``kvcar.context``, which registers them; the cache itself knows nothing of files."""


# In older releases of transformers a positive number is the length to crop to, as assisted generation there does.
_CROPS_TO_LENGTH = "max_length" in inspect.signature(DynamicLayer.crop).parameters


class KVCarCache(PassCache):
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

    def fork(self) -> KVCarCache:
        """Make a cache of the same tokens; the two share pages until one of them writes to a page.

        Raises:
            CacheStateError: an earlier pass broke off while it stored.
        """
        self._refuse_if_broken()
        self._drop_unfinished_pass()
        fork = KVCarCache(self.bundle, self.plan.window, self._keeps_decoded)
        fork._state, fork._seen, fork._host = self._state, self._seen, self._host
        fork._model_dtype = self._model_dtype
        for index, layer in enumerate(self.layers):
            if is_state(layer):
                fork.layers[index] = forked = deepcopy(layer)
                if isinstance(forked, CodedLayer):
                    fork._coded[index] = forked
            elif index not in self._coded:
                # Its tensors are replaced, never written to.
                fork.layers[index] = copy(layer)
        if self._pages is None:
            return fork
        fork._pages, fork._finer = self._pages.fork(), self._finer
        for index, layer in self._coded.items():
            if layer.buffers is not None:
                fork._coded[index].restore(layer.paged, *(side.clone() for side in layer.kept()), finer=layer.finer)
        return fork

    def __deepcopy__(self, memo: dict[int, Any]) -> KVCarCache:
        """Fork: what transformers means by a deep copy of a cache, without a copy of the model or of any page."""
        del memo
        return self.fork()

    def __copy__(self) -> KVCarCache:
        """Fork, too: two caches that share what they write to would spoil each other."""
        return self.fork()

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        """Refuse to be pickled: a cache belongs to an attached model, and pickles are never read."""
        raise TypeError(
            "a KVCarCache cannot be pickled, as it belongs to an attached model; cache.save(path) and "
            "KVCarCache.load(path, model) write and read it"
        )

    # Sequences and tokens

    def settle(self) -> None:
        """Forget a pass that was interrupted before its tokens were stored; ``generate`` then goes on after what is stored.

        Raises:
            CacheStateError: another thread is in a pass over the cache, or layers cannot go back.
        """
        self._refuse_if_broken()
        self._drop_unfinished_pass()

    def reset(self) -> None:
        """Forget all tokens; the cache can be used again, also with another batch size."""
        self._refuse_another_thread()
        for layer in self._plain_layers():  # older releases of transformers would keep as many tokens, all zero
            layer.keys = layer.values = None
            layer.is_initialized = False
        super().reset()
        self._clear()

    def activate_past_recording(self) -> None:
        """Keep what has left a window until the next ``crop``, so that tokens can be taken back that far."""
        # Not by way of ``super``: older releases of transformers do not have it.
        for layer in self.layers:
            if hasattr(layer, "activate_past_recording"):
                layer.activate_past_recording()  # pyright: ignore[reportAttributeAccessIssue]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Pick sequences ``beam_idx`` int64 ``[B]`` for beam search; raises InputError where there are no such sequences."""
        places = self._places(beam_idx)
        self._map_batch(lambda x: x.index_select(0, places.to(x.device)))
        for layer in self._other_layers() if len(places) else ():
            layer.reorder_cache(places)  # pyright: ignore[reportArgumentType]  # annotated as a legacy LongTensor
        if len(places):
            self._map_states(places)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence ``repeats`` times; raises InputError below 1."""
        if type(repeats) is not int or repeats < 1:
            raise InputError(f"sequences are repeated a whole number of times, at least 1, got {repeats!r}")
        places = torch.arange(self.batch_size if self._state is not None else 0).repeat_interleave(repeats)
        self._map_batch(lambda x: x.repeat_interleave(repeats, dim=0))
        for layer in self._other_layers():
            if is_state(layer):
                layer.reorder_cache(places)
            else:
                layer.batch_repeat_interleave(repeats)
        self._map_states(places)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep sequences ``indices``, whole numbers or a bool for each; raises InputError where there are no such sequences."""
        places = self._places(indices)
        self._map_batch(lambda x: x[places.to(x.device)])
        for layer in self._other_layers() if len(places) else ():
            if is_state(layer):
                layer.reorder_cache(places)
            else:
                # Layers may lie on several devices; places on the CPU do for all.
                layer.batch_select_indices(places.cpu())
        if len(places):
            self._map_states(places)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the most recent ``-tokens_to_remove`` tokens (a negative number, as transformers has it).

        Raises:
            CacheStateError: more tokens than there are, removing would reach into the sinks, or sliding layers have
                forgotten what came before.
        """
        self._refuse_if_broken()
        self._drop_unfinished_pass()
        try:
            tokens_to_remove = operator.index(tokens_to_remove)  # a tensor, where transformers computed it
        except TypeError:
            raise InputError(f"crop takes a whole number of tokens to remove, got {tokens_to_remove!r}") from None
        removed = -tokens_to_remove
        if removed < 0 and _CROPS_TO_LENGTH:
            removed = max(0, self._seen - tokens_to_remove)
        if removed < 0:
            raise InputError(f"crop takes a negative number of tokens to remove, got {tokens_to_remove}")
        if removed == 0 or self._state is None:
            self._end_recording()
            return
        if any(is_state(layer) for layer in self.layers):
            raise CacheStateError(
                f"cannot remove {removed} of {self._seen} tokens, as layers that keep a state (linear attention, Mamba, convolutions) "
                "cannot go back; reset the cache, or fork it before what is to be removed"
            )
        kept = self._seen - removed
        paged = min(kept, self._pages.tokens) if self._pages else 0
        if kept < 0 or (paged and paged < self._state.padding_most + self.plan.sinks):
            raise CacheStateError(f"cannot remove {removed} of {self._seen} tokens; reset the cache instead")
        self._refuse_passed(removed)
        if kept == 0:
            self.reset()
            return
        self._crop_plain(-removed)
        self._finer = None if self._finer is None else self._finer.cropped(paged)
        for index, layer in self._coded.items():
            layer.paged = paged
            layer.crop_window(kept - paged)
            if self._finer is not None:
                finer = self._finer_of(self.plan.is_windowed(index))
                layer.crop_finer(finer.tokens, finer.filled_tokens(paged))
        if self._pages is not None:
            self._pages.crop(paged)
        if self._decoded is not None:
            self._decoded.crop(paged)
        self._forget_views()
        self._state, self._seen = self._state.cropped(paged), kept
        self._end_recording()

    def flush_window(self) -> None:
        """Put the tokens of the window through the codec too; later ones fill a window again.

        Raises:
            CacheStateError: keys or values of all sequences are NaN or infinite, or no model has run over the cache yet.
        """
        self._refuse_if_broken()
        self._drop_unfinished_pass()
        in_window = self._seen - self._pages.tokens if self._pages is not None else 0
        if not self._coded or in_window == 0:
            return
        self._refuse_unattached()
        assert self._state is not None
        self._state = without_lost(self._coded, in_window, self._state, self.paged_tokens)
        self._broken = True  # unless all of it succeeds
        with stored_plainly(self._state.padding.device):
            self._code_oldest(in_window)
        self._free_passed_pages()
        self._broken = False

    # What is stored on disk

    def save(self, path: str | Path, *, keep_window: bool = False, token_ids: Tensor | None = None) -> None:
        """Write everything stored to one file, from which ``load`` goes on without a prefill; the cache stays as it is.

        A file that is there is replaced; an interruption leaves no half file. Needs ``pip install 'kvcar[store]'``.

        Args:
            path: the file.
            keep_window: store the window exactly, which takes far more bytes per token. By default its tokens go through
                the codec first, on a copy, as ``flush_window`` does.
            token_ids: the tokens, int64 ``[B, tokens]``, padding included; stored for whoever wants to check or compute
                the context again, ``load`` does not need them.

        Raises:
            CacheStateError: the cache holds no tokens, or NaN, infinite values or tokens at negative positions.
            InputError: token ids that are not those of the cache, or the extra ``store`` is not installed.
            ContextError: the file cannot be written.
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

        To go on from it, give ``model.generate`` the whole text: the tokens that were saved with something new at their
        end. Only what is new is computed.

        Args:
            path: the file.
            model: the model that the cache was filled with; attach it before or after.
            bundle: the bundle that it was saved with, or its folder; None takes the one ``model`` is attached with.
            window: recent tokens kept exact from now on, see ``KVCarCache``; None takes the saved cache's.

        Raises:
            ContextError: there is no such file, it is damaged or of another version, or it was saved with another bundle
                or another exact dtype.
            ModelMismatchError: the bundle was fitted for another model.
            AttachError: no bundle is given and the model is not attached.
            InputError: as for ``KVCarCache``, or the extra ``store`` is not installed.
        """
        return CONTEXT_STORE["load"](path, model, bundle, window)

    # What it holds, and its bytes

    @property
    def batch_size(self) -> int:
        """Sequences in the cache, -1 before the first pass."""
        return -1 if self._state is None else len(self._state.padding)

    @property
    def tokens(self) -> int:
        """Tokens stored of each sequence, padding included; those of a pass under way are not."""
        return self._seen

    @property
    def pages(self) -> int:
        """Pages that hold tokens, of each sequence, a partly filled one counted."""
        return -(-self.paged_tokens // self.plan.page_tokens)

    def stored_bytes(self, in_bfloat16: bool = False) -> int:
        """Bytes of all tensors that hold this cache, unfilled room and position tables included.

        Args:
            in_bfloat16: count what is kept exactly as in a model that runs in bfloat16, to compare with its own cache;
                published sizes are counted so.
        """
        parts = self.stored_bytes_by_part()
        if in_bfloat16:
            exact, plain = self._element_bytes()
            parts["exact"] = parts["exact"] * BFLOAT16_BYTES // exact
            parts["finer"] = parts["finer"] * BFLOAT16_BYTES // exact
            parts["plain"] = parts["plain"] * BFLOAT16_BYTES // plain
            if self._pages is not None:
                parts["pages"] = self._pages.nbytes_where(
                    lambda windowed: page_layout(self.plan, BFLOAT16_BYTES, windowed).page_bytes
                )
        return sum(parts.values())

    def stored_bytes_by_part(self) -> dict[str, int]:
        """``stored_bytes`` in parts: pages, exact (sinks, window), finer (pages kept exactly), plain (layers not coded), tables."""
        state = 0 if self._state is None else self._state.nbytes
        finer = sum(layer.finer_bytes for layer in self._coded.values())
        state += 0 if self._finer is None or not self._finer.pages else self._finer.nbytes
        host = self._host if self.paged_tokens else None
        rotaries = set() if host is None else {host.rotary(layer) for layer in self._coded}
        plain = [tensor for layer in self._plain_layers() for tensor in (layer.keys, layer.values)]
        plain += [tensor for layer in self.layers if is_state(layer) for tensor in states_of(layer)]
        return {
            "pages": 0 if self._pages is None else self._pages.nbytes,
            "exact": sum(layer.nbytes for layer in self._coded.values()) - finer,
            "finer": finer,
            "plain": sum(tensor.nbytes for tensor in plain if tensor is not None),
            "tables": state + sum(rotary.table_bytes for rotary in rotaries if rotary is not None),
        }

    def finer_page_share(self) -> float:
        """Share of the coded tokens, 0 to 1, that are read exactly because their page would cost more than ``max_page_cost``."""
        if self._finer is None or not self.paged_tokens:
            return 0.0
        return min(1.0, float(self._finer.exact_tokens.float().mean()) / self.paged_tokens)

    def codec_bytes_in_use(self) -> int:
        """Bytes of the codecs as they lie in memory, once for all caches of the model: those of the bundle before a first pass."""
        return self.bundle.codec_bytes if self._host is None else self._host.coder(self.bundle).codec_bytes()

    # Inside

    def _element_bytes(self) -> tuple[int, int]:
        """Bytes of an element of what is kept exactly in coded layers, and of other layers; 2 where there is none."""
        exact = [layer.buffers[0].itemsize for layer in self._coded.values() if layer.buffers is not None]
        plain = [layer.keys.itemsize for layer in self._plain_layers() if layer.keys is not None]
        return max(exact, default=BFLOAT16_BYTES), max(plain, default=BFLOAT16_BYTES)

    def _refuse_unattached(self) -> None:
        """A cache that was loaded has not met its model yet, and so cannot rotate keys back."""
        if self._host is None:
            raise CacheStateError(
                "this cache was loaded and its model has not run over it yet, so the window cannot be coded; run the "
                "model over some token first, or save with keep_window=True"
            )

    def _refuse_passed(self, removed: int) -> None:
        """Tokens cannot be taken back where windows would begin in pages that are freed; raises CacheStateError."""
        store = None if self._pages is None else self._pages.windowed
        if store is not None and store.freed_tokens > self._first_needed(self._seen - removed):
            raise CacheStateError(
                f"cannot remove {removed} of {self._seen} tokens, as layers of a sliding window have forgotten what came before "
                "it; reset the cache, or call cache.activate_past_recording() before what is to be removed"
            )

    def _end_recording(self) -> None:
        """Free what was kept back while tokens might be taken back, as transformers' own layers do in every ``crop``."""
        recording = [layer for layer in self._coded.values() if layer.record_past]
        for layer in recording:
            layer.record_past = False
        if recording and self._pages is not None:
            self._free_passed_pages()
        for layer in recording:
            layer.record_past = True

    def _forget_views(self) -> None:
        for views in self._views.values():
            views.forget()

    def _crop_plain(self, tokens_to_remove: int) -> None:
        """Sliding layers first, which refuse before anything has changed."""
        layers = sorted(self._plain_layers(), key=lambda layer: not isinstance(layer, DynamicSlidingWindowLayer))
        for layer in layers:
            try:
                layer.crop(tokens_to_remove)
            except (RuntimeError, ValueError) as error:
                raise CacheStateError(
                    f"cannot remove {-tokens_to_remove} of {self._seen} tokens, as layers of a sliding window have forgotten "
                    "what came before it; reset the cache, or call cache.activate_past_recording() before what is to be removed"
                ) from error

    def _map_states(self, places: Tensor) -> None:
        """Pick sequences of the states that coded layers keep beside keys and values."""
        for layer in self._coded.values():
            if isinstance(layer, CodedStateLayer):
                LinearAttentionLayer.reorder_cache(layer, places)  # pyright: ignore[reportArgumentType]  # a legacy LongTensor

    def _places(self, given: Any) -> Tensor:
        """Which sequences are meant, int64 ``[n]``; none of a cache without any, raises InputError where they are not there."""
        if self._state is None:
            return torch.empty(0, dtype=torch.int64)
        batch = self.batch_size
        try:
            places = torch.arange(batch)[given] if isinstance(given, slice) else torch.as_tensor(given)
        except (RuntimeError, TypeError, ValueError):
            places = torch.empty(0)
        if places.dtype == torch.bool and tuple(places.shape) == (batch,):
            places = places.nonzero().flatten()
        whole = places.ndim == 1 and len(places) and not places.is_floating_point() and places.dtype != torch.bool
        if not whole or int(places.min()) < -batch or int(places.max()) >= batch:
            raise InputError(f"the cache holds sequences 0 to {batch - 1}, got {given!r}; name at least one of them")
        return places.long() % batch

    def _map_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        self._refuse_if_broken()
        self._drop_unfinished_pass()
        self._forget_views()
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
            self._finer = None if self._finer is None else self._finer.mapped(change)
