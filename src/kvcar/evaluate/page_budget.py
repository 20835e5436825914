"""How many pages each layer should attend to, of so many on average: by what it costs to take pages from it.

A few neighbouring layers at a time attend to no more than the average while the others attend to all pages; the divergence
that this brings is their cost. Layers then get pages in proportion to a power of it (docs/log.md has how it was chosen).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..bundle import Bundle
from ..errors import InputError
from ..kernels.allocation import coded_tokens
from ..progress import OnProgress, counter, silent
from ..runtime.cache import KVCarCache
from ..runtime.prefill import PREFILL_CHUNK_TOKENS, prefill
from ..runtime.snapshot import fork_of
from .fidelity import TokenScores, step_logits
from .statistics import Estimate, mean_of

LAYERS_AT_ONCE = 3
BUDGET_TOKENS = 128
FEWEST_PAGES = 2
_POWER = 0.4


@dataclass(frozen=True)
class PageBudget:
    """Pages for each layer.

    Attributes:
        pages: one number for each layer of the model; layers that are not coded have the average, and no use for it.
        groups: layers that were limited together.
        costs: mean divergence per token, nats, with every group limited, against attending to all pages.
        held_pages: pages that there were at the end of a window.
    """

    pages: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]
    costs: tuple[Estimate, ...]
    held_pages: int


@torch.no_grad()
def measure_page_budget(
    model: PreTrainedModel,
    bundle: Bundle,
    windows: Tensor,
    average: int,
    following: int = BUDGET_TOKENS,
    layers_at_once: int = LAYERS_AT_ONCE,
    window: int | None = None,
    prefill_chunk: int = PREFILL_CHUNK_TOKENS,
    on_progress: OnProgress = silent,
) -> PageBudget:
    """Measure what limiting layers costs, and share out ``average`` pages a layer by it.

    Args:
        model: attached with ``bundle``.
        bundle: of the cache.
        windows: token ids int64 ``[N, context]``; their last ``following`` tokens are stepped one by one.
        average: pages of a layer, on average.
        following: tokens stepped.
        layers_at_once: neighbouring coded layers that are limited together.
        window: see ``KVCarCache``.
        prefill_chunk: tokens of the context fed at once.
        on_progress: told of prefill and of steps.

    Raises:
        InputError: windows too short, or no more pages than ``average``, so that there is nothing to choose.
    """
    count, context = windows.shape
    plan = KVCarCache(bundle, window).plan
    held = coded_tokens(context, plan.window, plan.page_tokens) // plan.page_tokens
    if average < FEWEST_PAGES or held <= average or following >= context - 1:
        raise InputError(
            f"a context of {context} tokens has {held} pages and its last {following} are stepped; to share out {average} "
            f"a layer there must be more pages than that, and {FEWEST_PAGES} or more for each layer"
        )
    coded = plan.coded_layers
    groups = tuple(tuple(coded[i : i + layers_at_once]) for i in range(0, len(coded), layers_at_once))
    divergences: list[list[Tensor]] = [[] for _ in groups]
    tell = counter(on_progress, "limit layers", count * (len(groups) + 1) * following)
    for ids in windows.to(model.device):
        cache, start = KVCarCache(bundle, window, attend_pages=context), context - following - 1
        prefill(model, cache, ids[None, :start], prefill_chunk, on_progress)
        reference = _stepped(model, fork_of(cache, None), ids[start:-1])
        tell(following)
        for group, found in zip(groups, divergences, strict=True):
            limited = [average if layer in group else context for layer in range(plan.geometry.layers)]
            scores = TokenScores()
            scores.add(_stepped(model, fork_of(cache, limited), ids[start:-1]), reference, ids[start + 1 :])
            found += scores.divergence
            tell(following)
    costs = tuple(mean_of(torch.cat(found)) for found in divergences)
    by_layer = {layer: cost.value for group, cost in zip(groups, costs, strict=True) for layer in group}
    shared = dict(zip(by_layer, share_pages(list(by_layer.values()), average, held), strict=True))
    pages = tuple(shared.get(layer, average) for layer in range(plan.geometry.layers))
    return PageBudget(pages, groups, costs, held)


def share_pages(costs: Sequence[float], average: int, most: int) -> list[int]:
    """Pages of each layer, ``FEWEST_PAGES`` to ``most``, in proportion to ``cost ** 0.4``; their mean is ``average``.

    Args:
        costs: of limiting each layer; any unit.
        average: pages of a layer on average, between the two.
        most: pages that a layer can have.
    """
    weights = torch.tensor(costs, dtype=torch.float64).clamp_min(1e-12) ** _POWER
    low, high, total = 0.0, most / float(weights.min()), average * len(costs)
    # What is cut off at either end goes to the others: find the factor at which the sum is right.
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if float((weights * middle).clamp(FEWEST_PAGES, most).sum()) < total else (low, middle)
        )
    wanted = (weights * high).clamp(FEWEST_PAGES, most)
    pages = wanted.floor().long()
    for layer in (pages - wanted).argsort()[: total - int(pages.sum())].tolist():
        pages[layer] += 1
    return pages.tolist()


def _stepped(model: PreTrainedModel, cache: KVCarCache, ids: Tensor) -> Tensor:
    """Logits ``[N, V]`` of ``ids`` int64 ``[N]``, one at a time."""
    return torch.cat([step_logits(model, part, cache) for part in ids.split(1)])
