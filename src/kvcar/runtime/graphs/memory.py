"""The tensors that a captured step reads and writes: they keep their places from step to step and from cache to cache."""

from __future__ import annotations

from weakref import ReferenceType, ref

import torch

from ...kernels.allocation import window_capacity
from ...plan import Plan
from ..cache import KVCarCache


def window_room(plan: Plan) -> int:
    """Tokens that fit behind the sinks: as many as a window can hold before a page leaves it."""
    return window_capacity(plan.window + plan.page_tokens)


class StepMemory:
    """What one step of a batch needs at fixed addresses: the token, counts, and each layer's sinks and window.

    The cache that is about to take a step moves into it, and stays there until another cache needs it.

    Args:
        cache: the first that will use it; others must have its bundle, window and batch.
        dtype: of what is held exactly.
        device: where the model runs.

    Attributes:
        token_ids: int64 ``[B, 1]``, the step's token.
        paged, held: int64 ``[1]``, tokens in pages, and tokens behind them in the window.
        padding, offset: int64 ``[B]``, see ``SequenceState``.
        buffers: of each layer, keys and values ``[B, H, sinks + room, D]``.
        room: tokens that a window may hold, the step's token among them.
    """

    def __init__(self, cache: KVCarCache, dtype: torch.dtype, device: torch.device) -> None:
        plan, batch = cache.plan, cache.batch_size
        geometry = plan.geometry
        self.sinks = plan.sinks
        self.room = window_room(plan)
        shape = (batch, geometry.kv_heads, self.sinks + self.room, geometry.head_dim)
        # Ordinary tensors, which may be written to in inference mode and outside of it.
        with torch.inference_mode(False):
            self.token_ids = torch.zeros(batch, 1, dtype=torch.int64, device=device)
            self.paged = torch.zeros(1, dtype=torch.int64, device=device)
            self.held = torch.zeros(1, dtype=torch.int64, device=device)
            self.padding = torch.zeros(batch, dtype=torch.int64, device=device)
            self.offset = torch.zeros(batch, dtype=torch.int64, device=device)
            self.buffers = {
                layer: (torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))
                for layer in plan.coded_layers
            }
        self._owner: ReferenceType[KVCarCache] | None = None

    @property
    def batch(self) -> int:
        """Sequences."""
        return len(self.padding)

    def take_in(self, cache: KVCarCache) -> None:
        """Hold the sinks and windows of ``cache``, and say how far its pass under way has come."""
        owner = None if self._owner is None else self._owner()
        if owner is not None and owner is not cache:
            for layer, coded in owner.coded_layers.items():
                coded.move_out_of(self.buffers[layer])
        self._owner = ref(cache)
        for layer, coded in cache.coded_layers.items():
            coded.move_into(self.buffers[layer])
        state = cache.pass_state
        self.padding.copy_(state.padding)
        self.offset.copy_(state.offset)
        # Not copied from the host, which would have the device waited for.
        self.paged.fill_(cache.paged_tokens)
        self.held.fill_(cache.tokens - cache.paged_tokens)
