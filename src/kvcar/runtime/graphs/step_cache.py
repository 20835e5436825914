"""What a model is given in place of a compressed cache while one of its steps is captured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING
from weakref import ReferenceType, ref

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from ...errors import KernelError
from ...kernels.attend import ExactPast, PagedPast
from ...kernels.rotary import RotaryTable
from ..coder import PageCoder
from ..host import Host
from ..summaries import PageSummaries
from .memory import StepMemory
from .step_summaries import StepSummaries

if TYPE_CHECKING:
    from ...kernels.attend.triton_pages import PageTable


class StepCache(Cache):
    """A cache of one step in which nothing but tensors' contents tells how many tokens there are.

    Attention runs over a table with room for ``pages`` pages of each sequence, whose addresses and whose number of tokens are
    read on the device. So a step that was captured goes on being right, until the table is full.

    Args:
        memory: what it reads and writes.
        host: the attached model.
        coder: its bundle, made ready.
        pages: pages that the table has room for.
        summaries: of a cache that attends to some pages alone, None for others.
        dtype: what the model computes in. Where it is wider than what is held, the step's own token is attended to
            as it is, before it is rounded.
    """

    def __init__(
        self,
        memory: StepMemory,
        host: Host,
        coder: PageCoder,
        pages: int,
        summaries: PageSummaries | None,
        dtype: torch.dtype,
    ) -> None:
        plan = coder.plan
        super().__init__(layers=[_StepLayer() for _ in range(plan.geometry.layers)])
        self._memory, self._coder, self._sinks = memory, coder, plan.sinks
        self._rotary: dict[int, RotaryTable | None] = {layer: host.rotary(layer) for layer in plan.coded_layers}
        self._dtype, self._apart = dtype, dtype != coder.dtype
        self._new: dict[int, tuple[Tensor, Tensor]] = {}
        self.places = pages * plan.page_tokens
        # A captured step reads them by their addresses: they must live as long, though longer ones may replace them elsewhere.
        self._angles = _angles({rotary for rotary in self._rotary.values() if rotary is not None}, self.places)
        with torch.inference_mode(False):
            # Where there is no page the table leads here: kernels read whole pages, and leave out what is not there.
            self._nowhere = torch.zeros(coder.layout.page_bytes, dtype=torch.uint8, device=coder.device)
            self._addresses = torch.empty(memory.batch, pages, dtype=torch.int64, device=coder.device)
            self._addresses.fill_(self._nowhere.data_ptr())
        # Weakly, as pages of a cache that is gone need not be kept.
        self._arenas: list[ReferenceType[Tensor]] = []
        self._summaries = None
        if summaries is not None:
            self._summaries = StepSummaries(summaries, plan, memory.batch, pages, coder.device)

    def point_at(self, arenas: Sequence[Tensor], summaries: PageSummaries | None) -> None:
        """Read the pages of ``arenas`` from now on, and choose among them by ``summaries``."""
        from ...kernels.attend.triton_pages import page_addresses

        if self._summaries is not None and summaries is not None:
            self._summaries.copy_from(summaries)
        if len(arenas) == len(self._arenas) and all(
            old() is new for old, new in zip(self._arenas, arenas, strict=True)
        ):
            return
        self._arenas = [ref(arena) for arena in arenas]
        self._addresses.fill_(self._nowhere.data_ptr())
        if arenas:
            addresses = page_addresses(arenas)[:, : self._addresses.shape[1]]
            self._addresses[:, : addresses.shape[1]] = addresses

    # Inside of what is captured

    def begin(self) -> Tensor:
        """Compute what all layers share; returns the token's positions int64 ``[B, 1]``."""
        memory, device = self._memory, self._memory.padding.device
        self._first = memory.padding + self._sinks
        self._last = memory.paged.expand(memory.batch).contiguous()
        self._cursor = memory.held + self._sinks
        slot = torch.arange(self._sinks + memory.room, device=device)
        sink = memory.padding[:, None] + slot
        token = memory.paged + slot - self._sinks
        held = slot < self._cursor if self._apart else slot <= self._cursor
        visible = torch.where(slot < self._sinks, sink < memory.paged, held & (token >= memory.padding[:, None]))
        if self._apart:
            visible = torch.cat([visible, memory.paged + memory.held >= memory.padding[:, None]], dim=1)
        self._mask = visible[:, None, None]
        return (memory.paged + memory.held - memory.offset).clamp_min(0)[:, None]

    def codes(self, layer: int) -> bool:
        """Whether attention of ``layer`` must come through ``attend``."""
        return layer in self._rotary

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write the keys and values ``[B, H, 1, D]`` of a layer behind those of its window."""
        del args, kwargs
        for buffer, new in zip(self._memory.buffers[layer_idx], (key_states, value_states), strict=True):
            buffer.index_copy_(2, self._cursor, new.to(buffer.dtype))
        self._new[layer_idx] = key_states, value_states
        return key_states, value_states

    def attend(self, layer: int, query: Tensor, scaling: float, softcap: float | None) -> Tensor:
        """Attention ``[B, 1, Hq, D]`` of ``query`` ``[B, Hq, 1, D]``.

        Raises:
            KernelError: the Triton kernels do not serve this layer.
        """
        from ...kernels.attend import triton as kernel  # only here: importing it needs Triton

        paged = PagedPast(
            tiles=(), tokens=self.places, first=self._first, first_most=0, offset=self._memory.offset,
            key_readers=self._coder.readers(layer, "key"), value_readers=self._coder.readers(layer, "value"),
            rotary=self._rotary[layer],
        )  # fmt: skip
        reason = kernel.serves(query, paged)
        if reason is not None:
            raise KernelError(f"layer {layer} is not served by the Triton kernels: {reason}")
        exact = self._exact(layer)
        table = self._table(layer, query, scaling)
        return kernel.attend_table(query, exact, paged, table, scaling, softcap).transpose(1, 2).contiguous()

    def _table(self, layer: int, query: Tensor, scaling: float) -> PageTable:
        """All pages, or those that the query attends to."""
        from ...kernels.attend.triton_pages import PageTable

        chosen = None
        if self._summaries is not None:
            chosen = self._summaries.choose(layer, query, scaling, self._first, self._last)
        if chosen is None:
            return PageTable(self._addresses, self._last, self.places, self.places)
        places = chosen.shape[1] * self._coder.plan.page_tokens
        return PageTable(self._addresses.gather(1, chosen), self._last, places, self.places, chosen)

    def _exact(self, layer: int) -> ExactPast:
        """Sinks, window and the step's token."""
        buffers, new = self._memory.buffers[layer], self._new.pop(layer)
        if not self._apart:
            return ExactPast(*buffers, self._mask)
        keys, values = (torch.cat([held.to(self._dtype), own], dim=2) for held, own in zip(buffers, new, strict=True))
        return ExactPast(keys, values, self._mask)

    def end_pass(self) -> None:
        """Nothing: ``KVCarCache.end_written_step`` follows every replay."""


def _angles(rotaries: set[RotaryTable], positions: int) -> list[tuple[Tensor, Tensor]]:
    from ...kernels.attend.triton_pages import angle_tables

    return [angle_tables(rotary, positions) for rotary in rotaries]


class _StepLayer(CacheLayerMixin):
    """One that tells transformers of no past, as the mask it would build is not used."""

    is_sliding = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Not used; ``StepCache.update`` writes."""
        raise NotImplementedError

    def get_seq_length(self) -> int:
        """No tokens: how many there are is known on the device alone."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The pass's own tokens."""
        return query_length, 0

    def get_max_length(self) -> int:
        """No maximum of its own."""
        return -1
