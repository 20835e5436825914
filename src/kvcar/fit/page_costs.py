"""What a page of ordinary text costs through a bundle's codes, and so what a page may cost before it is kept exactly."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..bundle import Bundle
from ..cache.attach import attach
from ..cache.cache import KVCarCache
from ..evaluate.fidelity import CHUNK_TOKENS, step_logits
from ..models.weights import device_of
from ..progress import OnProgress, counter, silent

# Above what pages of ordinary text cost, of kinds that the fit has not seen too: 5.3 times the median of what it has at most, but for
# one page in 250. Prompts of one or few tokens repeated cost ten to several hundred times the median.
TIMES_A_TYPICAL_PAGE = 5.5
MARGIN = 1.2
# What a page may cost in any case, nats a token, however little others do: fits of few kinds of text have a small median, and pages of
# other ordinary text beyond it that nobody would miss. One emoji over and over costs 0.0154 and more.
LEAST_LIMIT = 0.015
_NO_LIMIT = 1e30


def with_page_cost_limit(
    model: PreTrainedModel, bundle: Bundle, windows: Tensor, on_progress: OnProgress = silent
) -> Bundle:
    """The bundle with a number for ``max_page_cost`` instead of "auto", where its codecs know what their errors cost.

    Args:
        model: that it was fitted for, not attached.
        bundle: as it was fitted.
        windows: token ids int64 ``[N, T]`` of the text.
        on_progress: called with what is going on.
    """
    if bundle.plan.cache.max_page_cost != "auto" or not any(b.codec and b.codec.knows_cost for b in bundle.blocks):
        return bundle
    costs = page_costs(model, _limited(bundle, _NO_LIMIT), windows, on_progress)
    if not costs.numel():
        return bundle
    return _limited(
        bundle, float(max(TIMES_A_TYPICAL_PAGE * costs.median(), MARGIN * costs.quantile(0.9), LEAST_LIMIT))
    )


@torch.no_grad()
def page_costs(model: PreTrainedModel, bundle: Bundle, windows: Tensor, on_progress: OnProgress = silent) -> Tensor:
    """What every page of ``windows`` int64 ``[N, T]`` costs, nats a token, float32 ``[pages]``; the bundle must have a limit."""
    on_chunk, found = counter(on_progress, "measure what pages cost", windows.numel()), []
    with attach(model, bundle):
        for window in windows.to(device_of(model)):
            cache = KVCarCache(bundle)
            cache.page_costs = found
            for part in window.split(CHUNK_TOKENS):
                step_logits(model, part, cache)
                on_chunk(len(part))
    return (
        torch.cat([costs.flatten().float().cpu() for costs in found]) if found else torch.zeros(0, dtype=torch.float32)
    )


def _limited(bundle: Bundle, limit: float) -> Bundle:
    cache = replace(bundle.plan.cache, max_page_cost=limit)
    return replace(bundle, plan=bundle.plan.model_copy(update={"cache": cache}))
