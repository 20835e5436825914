"""Summaries of pages where a captured step finds them, and its choice among them."""

from __future__ import annotations

from weakref import ReferenceType, ref

import torch
from torch import Tensor

from ...kernels.select import naive
from ...plan import Plan
from ..summaries import SUMMARY_DTYPE, PageSummaries


class StepSummaries:
    """Copies of a cache's summaries with room for more pages; which are there is known on the device.

    Args:
        summaries: of a cache like those that will be copied from.
        plan: its plan.
        batch: sequences.
        pages: room.
        device: where the model runs.
    """

    def __init__(self, summaries: PageSummaries, plan: Plan, batch: int, pages: int, device: torch.device) -> None:
        self._summary, self._pages, self._page_tokens = summaries.summary, pages, plan.page_tokens
        self._most = {layer: summaries.most_of(layer) for layer in plan.coded_layers}
        geometry = plan.geometry
        shape = (batch, geometry.kv_heads, pages, summaries.summary.vectors * geometry.head_dim)
        with torch.inference_mode(False):
            self._buffers = {
                layer: torch.zeros(shape, dtype=SUMMARY_DTYPE, device=device) for layer in plan.coded_layers
            }
        self._copied: dict[int, ReferenceType[Tensor]] = {}

    def copy_from(self, summaries: PageSummaries) -> None:
        """Take over what ``summaries`` holds of all full pages."""
        for layer, buffer in self._buffers.items():
            held = summaries.held(layer)
            # The same view as long as nothing about it changes.
            copied = self._copied.get(layer)
            if held is not None and (copied is None or copied() is not held):
                buffer[:, :, : held.shape[2]] = held
                self._copied[layer] = ref(held)

    def choose(self, layer: int, query: Tensor, scaling: float, first: Tensor, last: Tensor) -> Tensor | None:
        """Pages int64 ``[B, K]`` that ``query`` attends to, None for all that there is room for.

        Args:
            layer: a coded layer.
            query: ``[B, Hq, T, D]``.
            scaling: factor on the scores.
            first, last: int64 ``[B]``, the tokens in pages that may be seen.
        """
        if self._pages <= self._most[layer]:
            return None
        hidden, there = first // self._page_tokens, last // self._page_tokens
        buffer, most = self._buffers[layer], self._most[layer]
        return naive.choose_pages(query, buffer, self._summary, scaling, most, hidden, False, there)
