"""What attending to a few pages costs and brings: quality and time of decode steps, by the number of pages.

Prefill attends to everything, so one cache is filled for all numbers of pages; the text that follows is stepped from
forks of it, a few tokens at a time as decoding does, beside the model's own full cache.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from ..bundle import Bundle
from ..errors import InputError
from ..progress import OnProgress, counter, silent
from ..runtime.cache import KVCarCache
from ..runtime.prefill import PREFILL_CHUNK_TOKENS, prefill
from ..runtime.snapshot import fork_of
from ..runtime.summaries import LONGEST_SELECTING_PASS_TOKENS, PageCounts
from .fidelity import TokenScores, step_logits
from .full_cache import bfloat16_bytes
from .statistics import Estimate, estimate_figures, mean_of, ratio_of

FOLLOWING_TOKENS = 256


@dataclass(frozen=True)
class Attended:
    """Decode steps that attend to one number of pages, over some windows of text.

    Attributes:
        attend_pages: pages attended to in every layer, or in each one; None for all.
        pages: pages there are in the end.
        perplexity, perplexity_full: of the following tokens, with this cache and with the full one.
        perplexity_ratio: of the two, on the same tokens.
        kl_divergence: mean per following token, nats, full cache against this.
        kl_divergence_from_all: the same, this bundle attending to all pages against this.
        same_top: share of following tokens for which full cache and this rank the same token first.
        seconds_per_step, seconds_per_step_full: medians.
        stored_bytes, full_bytes: in the end, the mean over windows; the full cache counted in bfloat16.
        context, following: tokens of a window, and how many at its end were scored; windows: how many.
        step_tokens: tokens fed at once.
    """

    attend_pages: PageCounts | None
    pages: int
    perplexity: Estimate
    perplexity_full: Estimate
    perplexity_ratio: Estimate
    kl_divergence: Estimate
    kl_divergence_from_all: Estimate
    same_top: Estimate
    seconds_per_step: float
    seconds_per_step_full: float
    stored_bytes: float
    full_bytes: float
    context: int
    following: int
    windows: int
    step_tokens: int

    @property
    def times_smaller(self) -> float:
        """Bytes of the model's own cache over those stored, summaries counted."""
        return self.full_bytes / self.stored_bytes


@dataclass
class _Run:
    """What is gathered of one number of pages."""

    scores: TokenScores = field(default_factory=TokenScores)
    from_all: TokenScores = field(default_factory=TokenScores)
    seconds: list[float] = field(default_factory=list)
    stored_bytes: list[int] = field(default_factory=list)
    pages: int = 0


@torch.no_grad()
def measure_attended(
    model: PreTrainedModel,
    bundle: Bundle,
    windows: Tensor,
    page_counts: Sequence[int | tuple[int, ...]],
    following: int = FOLLOWING_TOKENS,
    window: int | None = None,
    step_tokens: int = 1,
    prefill_chunk: int = PREFILL_CHUNK_TOKENS,
    on_progress: OnProgress = silent,
) -> dict[PageCounts | None, Attended]:
    """Step the end of every window with all pages (None) and with each of ``page_counts``.

    Args:
        model: attached with ``bundle``.
        bundle: of the cache.
        windows: token ids int64 ``[N, context]``; their last ``following`` tokens are predicted.
        page_counts: see ``KVCarCache``'s ``attend_pages``.
        following: tokens scored at the end of each window.
        window: see ``KVCarCache``.
        step_tokens: tokens fed at once.
        prefill_chunk: tokens of the context fed at once.
        on_progress: told of prefill and of steps.

    Raises:
        InputError: windows too short, steps too long to choose pages, or a number of pages below 1.
    """
    count, context = windows.shape
    _check(context, following, step_tokens)
    runs: dict[PageCounts | None, _Run] = {pages: _Run() for pages in (None, *page_counts)}
    full_run = _Run()
    tell = counter(on_progress, "decode", count * following * (len(runs) + 1))
    for ids in windows.to(model.device):
        start = context - following - 1
        # So many pages that a short last chunk of the context does not choose among them.
        cache = KVCarCache(bundle, window, attend_pages=context)
        full = DynamicCache(config=model.config)
        for each in (full, cache):
            prefill(model, each, ids[None, :start], prefill_chunk, on_progress)
        targets = ids[start + 1 :]
        reference = _stepped(model, full, ids[start:-1], step_tokens, full_run)
        tell(following)
        full_run.stored_bytes.append(bfloat16_bytes(full))
        from_all = None
        for pages, run in runs.items():
            fork = fork_of(cache, pages)
            logits = _stepped(model, fork, ids[start:-1], step_tokens, run)
            from_all = logits if from_all is None else from_all
            run.scores.add(logits, reference, targets)
            run.from_all.add(logits, from_all, targets)
            run.stored_bytes.append(fork.stored_bytes())
            run.pages = fork.pages
            tell(following)
    return {
        pages: _summarise(pages, run, full_run, context, following, count, step_tokens) for pages, run in runs.items()
    }


def _check(context: int, following: int, step_tokens: int) -> None:
    if following < 1 or context < following + 2:
        raise InputError(
            f"windows of {context} tokens leave no context before {following} tokens to step; give longer windows or "
            "fewer following tokens"
        )
    if not 1 <= step_tokens <= LONGEST_SELECTING_PASS_TOKENS:
        raise InputError(
            f"steps of {step_tokens} tokens attend to all pages; take 1 to {LONGEST_SELECTING_PASS_TOKENS}"
        )


def _stepped(model: PreTrainedModel, cache: Cache, ids: Tensor, step_tokens: int, run: _Run) -> Tensor:
    """Logits ``[N, V]`` of steps over ``ids`` int64 ``[N]``."""
    logits = []
    for part in ids.split(step_tokens):
        began = time.perf_counter()
        logits.append(step_logits(model, part, cache))
        if logits[-1].is_cuda:
            torch.cuda.synchronize()
        run.seconds.append(time.perf_counter() - began)
    return torch.cat(logits)


def _summarise(
    pages: PageCounts | None, run: _Run, full: _Run, context: int, following: int, windows: int, step_tokens: int
) -> Attended:
    nll, nll_full = torch.cat(run.scores.nll), torch.cat(run.scores.nll_full)
    return Attended(
        attend_pages=pages,
        pages=run.pages,
        perplexity=mean_of(nll).exponential(),
        perplexity_full=mean_of(nll_full).exponential(),
        perplexity_ratio=ratio_of(nll, nll_full),
        kl_divergence=mean_of(torch.cat(run.scores.divergence)),
        kl_divergence_from_all=mean_of(torch.cat(run.from_all.divergence)),
        same_top=mean_of(torch.cat(run.scores.same_top)),
        seconds_per_step=median(run.seconds),
        seconds_per_step_full=median(full.seconds),
        stored_bytes=sum(run.stored_bytes) / windows,
        full_bytes=sum(full.stored_bytes) / windows,
        context=context,
        following=following,
        windows=windows,
        step_tokens=step_tokens,
    )


def attended_figures(a: Attended) -> dict[str, Any]:
    """Figures for a record; names carry units, divergences are in nats per token."""
    names = ("perplexity", "perplexity_full", "perplexity_ratio", "kl_divergence", "kl_divergence_from_all", "same_top")
    return (
        {"attend_pages": a.attend_pages, "pages": a.pages}
        | estimate_figures(a, names)
        | {
            "seconds_per_step_median": a.seconds_per_step,
            "seconds_per_step_full_median": a.seconds_per_step_full,
            "stored_bytes": a.stored_bytes,
            "full_bytes": a.full_bytes,
            "times_smaller": a.times_smaller,
            "context": a.context,
            "following": a.following,
            "windows": a.windows,
            "step_tokens": a.step_tokens,
        }
    )
