"""Quality of a cache against the same model's full cache, teacher-forced and stepped through both.

``model(input_ids)`` never reads a cache, so a cache looks perfect there. Here the text is fed in chunks of a page;
each chunk attends over what the cache made of the chunks before. Both caches see the same tokens in the same chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from ..errors import InputError
from .full_cache import bfloat16_bytes, held_bytes
from .statistics import Estimate, estimate_figures, mean_of, ratio_of

CHUNK_TOKENS = 64


@runtime_checkable
class CountsBytes(Protocol):
    """A cache that says itself what it stores, as ``KVCarCache`` does."""

    def stored_bytes(self) -> int:
        """Bytes of everything that this cache stores, or would store, for the tokens it has seen."""
        ...


def stored_bytes(cache: Cache) -> int:
    """Bytes of any cache: its own count where it has one, the tensors it holds where it is one of transformers'."""
    return cache.stored_bytes() if isinstance(cache, CountsBytes) else held_bytes(cache)


@dataclass
class TokenScores:
    """Per-token figures of one cache, float64 ``[windows, context - 1]`` once stacked.

    Attributes:
        nll: negative log-likelihood in nats with this cache.
        nll_full: the same with the full cache.
        divergence: Kullback-Leibler divergence of the next-token distributions, full against this, in nats.
        same_top: whether both caches rank the same token first.
    """

    nll: list[Tensor] = field(default_factory=list)
    nll_full: list[Tensor] = field(default_factory=list)
    divergence: list[Tensor] = field(default_factory=list)
    same_top: list[Tensor] = field(default_factory=list)

    def add(self, logits: Tensor, full: Tensor, targets: Tensor) -> None:
        """Score logits ``[T, V]`` of both caches for the tokens ``targets`` int64 ``[T]`` that follow."""
        log_p = torch.log_softmax(full.float(), -1)
        log_q = torch.log_softmax(logits.float(), -1)
        self.nll.append(-log_q.gather(1, targets[:, None])[:, 0].double())
        self.nll_full.append(-log_p.gather(1, targets[:, None])[:, 0].double())
        # Never negative but for rounding, of the order of 1e-7.
        self.divergence.append((log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0).double())
        self.same_top.append((log_p.argmax(-1) == log_q.argmax(-1)).double())


@dataclass(frozen=True)
class Fidelity:
    """Quality and size of one cache over some windows of text.

    Attributes:
        perplexity, perplexity_full: with this cache and with the full one.
        perplexity_ratio: of the two, on the same tokens.
        kl_divergence: mean per token, nats; 0 is perfect.
        same_top: share of tokens for which both rank the same token first.
        kl_divergence_worst_1_percent: smallest of the largest hundredth of the tokens' divergences.
        window_kl_divergences: mean of every window, in the order of the text.
        stored_bytes: bytes of the cache's tensors at the end of a window, the mean over windows.
        full_bytes: bytes of the model's own cache in bfloat16 at the same length.
        tokens: tokens scored; context: tokens of a window; windows: how many.
    """

    perplexity: Estimate
    perplexity_full: Estimate
    perplexity_ratio: Estimate
    kl_divergence: Estimate
    same_top: Estimate
    kl_divergence_worst_1_percent: float
    window_kl_divergences: tuple[float, ...]
    stored_bytes: float
    full_bytes: float
    tokens: int
    context: int
    windows: int

    @property
    def stored_bytes_per_token(self) -> float:
        """Bytes of the cache per token at this context length, everything counted."""
        return self.stored_bytes / self.context

    @property
    def full_bytes_per_token(self) -> float:
        """Bytes per token of the model's own cache in bfloat16."""
        return self.full_bytes / self.context

    @property
    def times_smaller(self) -> float:
        """Bytes of the model's own cache over bytes of this one."""
        return self.full_bytes / self.stored_bytes


@torch.no_grad()
def measure_fidelity(
    model: PreTrainedModel,
    windows: Tensor,
    caches: Mapping[str, Callable[[], Cache]],
    on_chunk: Callable[[int], None] | None = None,
    chunk: int = CHUNK_TOKENS,
) -> dict[str, Fidelity]:
    """Step all caches and the full one over the same text, side by side.

    Args:
        model: the model; attached, if a ``KVCarCache`` is among the caches.
        windows: token ids int64 ``[N, context]``.
        caches: makes an empty cache of any kind, by name; see ``stored_bytes`` for how it is counted.
        on_chunk: told after every chunk how many tokens it had.
        chunk: tokens fed at once.

    Raises:
        InputError: windows of fewer than 2 tokens.
    """
    if windows.ndim != 2 or windows.shape[0] == 0 or windows.shape[1] < 2:
        raise InputError(
            f"evaluation needs windows of at least 2 tokens, got token ids of shape {tuple(windows.shape)}"
        )
    scores = {name: TokenScores() for name in caches}
    stored = dict.fromkeys(caches, 0.0)
    full_bytes = 0.0
    for window in windows:
        full = DynamicCache(config=model.config)
        stepped = {name: make() for name, make in caches.items()}
        for ids, targets in _chunks(window.to(model.device), chunk):
            reference = step_logits(model, ids, full)[: len(targets)]
            for name, cache in stepped.items():
                logits = step_logits(model, ids, cache)[: len(targets)]
                if len(targets):
                    scores[name].add(logits, reference, targets)
            if on_chunk is not None:
                on_chunk(len(ids))
        full_bytes += bfloat16_bytes(full) / len(windows)
        for name, cache in stepped.items():
            stored[name] += stored_bytes(cache) / len(windows)
    return {name: _summarise(scores[name], windows, stored[name], full_bytes) for name in caches}


def _chunks(window: Tensor, chunk: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Token ids of each chunk and the tokens that follow them (one fewer at the end of the window)."""
    for start in range(0, len(window), chunk):
        yield window[start : start + chunk], window[start + 1 : start + chunk + 1]


def step_logits(model: PreTrainedModel, ids: Tensor, cache: Cache) -> Tensor:
    """Logits ``[T, V]`` of one step over ``ids`` int64 ``[T]``, which the cache then holds too."""
    return model(input_ids=ids[None], past_key_values=cache, use_cache=True).logits[0]


def _summarise(scores: TokenScores, windows: Tensor, stored_bytes: float, full_bytes: float) -> Fidelity:
    nll, nll_full = torch.cat(scores.nll), torch.cat(scores.nll_full)
    divergence, same_top = torch.cat(scores.divergence), torch.cat(scores.same_top)
    count, context = windows.shape
    return Fidelity(
        perplexity=mean_of(nll).exponential(),
        perplexity_full=mean_of(nll_full).exponential(),
        perplexity_ratio=ratio_of(nll, nll_full),
        kl_divergence=mean_of(divergence),
        same_top=mean_of(same_top),
        kl_divergence_worst_1_percent=float(divergence.quantile(0.99)),
        window_kl_divergences=tuple(divergence.view(count, context - 1).mean(1).tolist()),
        stored_bytes=stored_bytes,
        full_bytes=full_bytes,
        tokens=len(nll),
        context=context,
        windows=count,
    )


def fidelity_figures(f: Fidelity) -> dict[str, Any]:
    """Figures for a record; names carry units, divergences are in nats per token."""
    names = ("perplexity", "perplexity_full", "perplexity_ratio", "kl_divergence", "same_top")
    return estimate_figures(f, names) | {
        "kl_divergence_worst_1_percent": f.kl_divergence_worst_1_percent,
        "window_kl_divergences": list(f.window_kl_divergences),
        "stored_bytes": f.stored_bytes,
        "full_bytes": f.full_bytes,
        "stored_bytes_per_token": f.stored_bytes_per_token,
        "full_bytes_per_token": f.full_bytes_per_token,
        "times_smaller": f.times_smaller,
        "tokens": f.tokens,
        "context": f.context,
        "windows": f.windows,
    }
