"""The exact part of one coded layer: sinks, window, and the tokens of the pass under way."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, LinearAttentionLayer

from ..errors import AttachError, CacheStateError
from ..kernels.attend import Buffered, ExactPast
from ..sizes import window_capacity
from .finer import FinerWrite


class CodedLayer(CacheLayerMixin):
    """One layer of a ``KVCarCache`` whose past lies in pages.

    ``buffers`` holds keys and values ``[B, H, sinks + finer + capacity, D]``: the sinks, tokens of finer pages, the window.
    Tokens of the pass under way stay apart, in the model's dtype, until the whole pass is over and all layers store together.

    Args:
        sinks: first tokens kept for ever.
        sliding_window: tokens that the layer attends to; 0 for all of the past.
    """

    is_compileable = False
    is_croppable = True
    supports_early_init = False
    is_sliding = False  # of the class, as transformers has it

    def __init__(self, sinks: int, sliding_window: int = 0) -> None:
        super().__init__()
        self.sinks, self.sliding_window = sinks, sliding_window
        self.is_sliding = sliding_window > 0
        self.record_past = False
        self.open = False
        self.attended = False
        self.paged = 0
        self.finer = 0
        self.in_window = 0
        self.buffers: tuple[Tensor, Tensor] | None = None
        self.pending: tuple[Tensor, Tensor] | None = None
        self._given: tuple[Tensor, Tensor] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare: buffers are made when the first pass ends."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write, as ``Cache`` asks its layers to; attention reads the past from the cache itself."""
        del args, kwargs
        self.write(key_states, value_states)
        return key_states, value_states

    def write(self, key: Tensor, value: Tensor, device: torch.device | None = None) -> None:
        """Take the keys and values ``[B, H, T, D]`` of this pass, to be kept on ``device``; see ``KVCarCache.write`` for the errors."""
        if not self.open:
            raise AttachError(
                "a KVCarCache was given to a model that is not attached to kvcar; call kvcar.attach(model, bundle) first (or "
                "something else was done to the cache in the middle of a pass over it)"
            )
        if self.pending is not None:
            raise CacheStateError("a layer stored keys twice in one forward pass; kvcar does not support such models")
        # Under autocast keys come out of their rotation in float32, and values in what products give.
        dtype = torch.promote_types(key.dtype, value.dtype)
        self.pending = (key.to(device, dtype), value.to(device, dtype))
        self._given, self.attended = (key, value), False

    def gave(self, key: Tensor, value: Tensor) -> bool:
        """Whether these are the very tensors that this layer was given in the pass under way."""
        return (
            self.pending is not None and self._given is not None and self._given[0] is key and self._given[1] is value
        )

    def get_seq_length(self) -> int:
        """Tokens seen, padding included."""
        return self.paged + self.in_window + (0 if self.pending is None else self.pending[0].shape[2])

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask that transformers would build."""
        return mask_sizes(self.get_seq_length(), query_length, self.sliding_window)

    def activate_past_recording(self) -> None:
        """Let no page be freed until the next ``crop``, as transformers asks before it takes tokens back."""
        self.record_past = True

    def get_max_length(self) -> int:
        """No maximum of its own."""
        return -1

    def get_max_cache_shape(self) -> int:
        """The same by its name in older versions of transformers."""
        return self.get_max_length()

    def exact(self, mask: Tensor | None) -> ExactPast:
        """What attention reads as it is: sinks, finer pages and window, then this pass; ``mask`` covers all of it.

        Sinks come first only once pages exist; until then the first tokens are in the window.
        """
        assert self.pending is not None
        start, stop = 0 if self.paged else self.sinks, self._before_window + self.in_window
        if self.buffers is None or start == stop:
            return ExactPast(*self.pending, mask)
        return ExactPast(*self.pending, mask, Buffered(*self.buffers, start, stop))

    def oldest(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B, H, count, D]`` of tokens ``first`` on, counted from the oldest outside the pages."""
        low, high = min(first, self.in_window), min(first + count, self.in_window)
        parts = []
        for side, new in enumerate(self._arriving()):
            fresh = new[:, :, max(0, first - self.in_window) : max(0, first + count - self.in_window)]
            if low == high or self.buffers is None:
                parts.append(fresh)
                continue
            window = self.buffers[side][:, :, self._before_window + low : self._before_window + high].to(new.dtype)
            parts.append(torch.cat([window, fresh], dim=2) if fresh.shape[2] else window)
        return parts[0], parts[1]

    def store(
        self,
        leave: int,
        sink_source: Tensor | None,
        dtype: torch.dtype,
        finer: int = 0,
        writes: Sequence[FinerWrite] = (),
    ) -> None:
        """The oldest ``leave`` tokens have become pages, at the end of a pass or between two; the others stay here.

        Args:
            leave: tokens that leave, counted from the oldest outside the pages.
            sink_source: int64 ``[B, sinks]``, for every sink its place among the leaving tokens, -1 where it is not
                among them; None when no sink is.
            dtype: dtype of what is kept exactly.
            finer: tokens of finer pages that there is room for from now on; never fewer than before.
            writes: which of the leaving tokens are kept among them.
        """
        going = self.oldest(0, leave) if sink_source is not None or writes else None
        total = self.in_window + self._arriving()[0].shape[2] - leave
        if leave == 0 and self.buffers is not None and self._fits(total):
            self._write_in_place()
        else:
            self.buffers = self._rebuilt(leave, total, dtype, finer, writes, going)
        if going is not None and sink_source is not None:
            self._fill_sinks(going, sink_source)
        self.paged += leave
        self.in_window, self.finer = total, finer
        self.pending = self._given = None

    def crop_window(self, tokens: int) -> None:
        """Keep the oldest ``tokens`` tokens of the window."""
        self.in_window = tokens

    def kept(self) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B, H, sinks + finer + window, D]`` of what is stored exactly between passes."""
        assert self.buffers is not None
        (keys, values), stop = self.buffers, self._before_window + self.in_window
        return keys[:, :, :stop], values[:, :, :stop]

    def restore(self, paged: int, keys: Tensor, values: Tensor, finer: int = 0) -> None:
        """Hold what ``kept`` gave of a layer of which ``paged`` tokens lay in pages, and ``finer`` had room in finer ones."""
        self.paged, self.finer, self.in_window = paged, finer, keys.shape[2] - self.sinks - finer
        self.buffers = (keys, values)

    def crop_finer(self, finer: int, filled: int) -> None:
        """Keep the room for the first ``finer`` tokens of finer pages, of which ``filled`` are left; the others are wiped out."""
        if finer < self.finer and self.buffers is not None:
            kept, rest = self.sinks + finer, self._before_window
            keys, values = (torch.cat([side[:, :, :kept], side[:, :, rest:]], dim=2) for side in self.buffers)
            self.buffers = (keys, values)
        self.finer = min(finer, self.finer)
        if filled < self.finer and self.buffers is not None:
            # What is masked is still multiplied by 0, which NaN does not go away by.
            for side in self.buffers:
                side[:, :, self.sinks + filled : self._before_window] = 0

    def drop_finer(self, tokens: int) -> None:
        """Free the first ``tokens`` tokens of finer pages, which the layer's window has passed."""
        if tokens and self.buffers is not None:
            kept, rest = self.sinks, self.sinks + tokens
            keys, values = (torch.cat([side[:, :, :kept], side[:, :, rest:]], dim=2) for side in self.buffers)
            self.buffers = (keys, values)
            self.finer -= tokens

    def map_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace the buffers by ``change(buffer)``, which works on the batch axis (0)."""
        if self.buffers is not None:
            self.buffers = (change(self.buffers[0]), change(self.buffers[1]))

    def reset(self) -> None:
        """Forget everything."""
        self.paged = self.finer = self.in_window = 0
        self.buffers = self.pending = None

    @property
    def nbytes(self) -> int:
        """Bytes of sinks and window."""
        return 0 if self.buffers is None else sum(buffer.nbytes for buffer in self.buffers)

    @property
    def finer_bytes(self) -> int:
        """Bytes of the tokens of finer pages, which ``nbytes`` counts too."""
        return 0 if self.buffers is None else self.nbytes // self.buffers[0].shape[2] * self.finer

    @property
    def _before_window(self) -> int:
        """Tokens in the buffers before those of the window."""
        return self.sinks + self.finer

    def _arriving(self) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B, H, T, D]`` of the pass under way; no tokens at all between passes."""
        if self.pending is not None:
            return self.pending
        assert self.buffers is not None
        return self.buffers[0][:, :, :0], self.buffers[1][:, :, :0]

    def _fits(self, total: int) -> bool:
        assert self.buffers is not None
        return self._before_window + total <= self.buffers[0].shape[2]

    def _write_in_place(self) -> None:
        assert self.buffers is not None
        for buffer, new in zip(self.buffers, self._arriving(), strict=True):
            start = self._before_window + self.in_window
            buffer[:, :, start : start + new.shape[2]] = new

    def _rebuilt(
        self,
        leave: int,
        total: int,
        dtype: torch.dtype,
        finer: int,
        writes: Sequence[FinerWrite],
        going: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        rebuilt, before = [], self.sinks + finer
        for side, new in enumerate(self._arriving()):
            batch, heads, _, dim = new.shape
            size = before + window_capacity(total)
            buffer = torch.zeros(batch, heads, size, dim, dtype=dtype, device=new.device)
            stays = max(0, self.in_window - leave)
            if self.buffers is not None:
                old, end = self.buffers[side], self._before_window + self.in_window
                buffer[:, :, : self._before_window] = old[:, :, : self._before_window]
                buffer[:, :, before : before + stays] = old[:, :, end - stays : end]
            buffer[:, :, before + stays : before + total] = new[:, :, new.shape[2] - (total - stays) :]
            for write in writes:
                assert going is not None
                kept = going[side][:, :, write.first : write.first + write.count]
                buffer[:, :, self.sinks + write.place : self.sinks + write.place + write.count] = kept
            rebuilt.append(buffer)
        return rebuilt[0], rebuilt[1]

    def _fill_sinks(self, going: tuple[Tensor, Tensor], source: Tensor) -> None:
        assert self.buffers is not None
        found = (source >= 0)[:, None, :, None]
        for buffer, tokens in zip(self.buffers, going, strict=True):
            index = source.clamp_min(0)[:, None, :, None].expand(-1, tokens.shape[1], -1, tokens.shape[3])
            picked = tokens.gather(2, index).to(buffer.dtype)
            sinks = buffer[:, :, : self.sinks]
            buffer[:, :, : self.sinks] = torch.where(found, picked, sinks)


def mask_sizes(seen: int, query_length: int, sliding_window: int) -> tuple[int, int]:
    """Length and first token of the mask for ``query_length`` tokens after ``seen``, as transformers counts them."""
    first = max(seen - sliding_window + 1, 0) if sliding_window else 0
    return seen - first + query_length, first


class CodedStateLayer(LinearAttentionLayer, CodedLayer):  # pyright: ignore[reportIncompatibleMethodOverride]
    """A coded layer that keeps a state of the model's own kind beside keys and values.

    Args:
        sinks: first tokens kept for ever.
        sliding_window: see ``CodedLayer``.
        states: options of the model's own layer.
    """

    is_compileable = False
    is_croppable = False  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]  # of a state, never

    def __init__(self, sinks: int, sliding_window: int = 0, **states: int) -> None:
        CodedLayer.__init__(self, sinks, sliding_window)
        LinearAttentionLayer.__init__(self, **states)

    def reset(self) -> None:
        """Forget everything."""
        LinearAttentionLayer.reset(self)
        CodedLayer.reset(self)


def state_options(layer: object) -> dict[str, int]:
    """What a layer of the model's own that keeps a state was made with; versions of transformers before 5.23 know one state."""
    number = getattr(layer, "number_of_states", None)
    return {} if number is None else {"number_of_states": number}
