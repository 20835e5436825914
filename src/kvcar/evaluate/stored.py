"""Stored contexts: how well a model goes on from one, and what saving and loading cost against computing it again.

The text that follows a context is scored, not the context: a cache is filled with the context, stored, loaded, and
stepped over the tokens that follow, beside the model's own full cache.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ..cache.attach import PREFILL_CHUNK_TOKENS, prefill
from ..cache.cache import KVCarCache
from ..errors import InputError
from ..models.weights import device_of
from .fidelity import CHUNK_TOKENS, Estimate, TokenScores, estimate_figures, mean_of, ratio_of, step_logits
from .memory import bfloat16_bytes


@dataclass(frozen=True)
class Continuation:
    """Quality of going on from a stored context, and its size, over some windows of text.

    Attributes:
        perplexity, perplexity_full: of the following tokens, from the stored context and from the full cache.
        perplexity_ratio: of the two, on the same tokens.
        kl_divergence: mean per following token, nats, full against stored.
        same_top: share of following tokens for which both rank the same token first.
        window_kl_divergences: mean of every window, in the order of the text.
        file_bytes: of a context's file, the mean over windows.
        full_bytes: of the model's own cache in bfloat16 at the same length.
        context, following: tokens stored and scored in a window; windows: how many.
    """

    perplexity: Estimate
    perplexity_full: Estimate
    perplexity_ratio: Estimate
    kl_divergence: Estimate
    same_top: Estimate
    window_kl_divergences: tuple[float, ...]
    file_bytes: float
    full_bytes: float
    context: int
    following: int
    windows: int

    @property
    def times_smaller(self) -> float:
        """Bytes of the model's own cache over those of the file."""
        return self.full_bytes / self.file_bytes


@dataclass(frozen=True)
class ContextTimes:
    """Seconds of every repeat, measured in turn: computing a context, storing it, loading it.

    Attributes:
        prefill_full: with the model's own cache; what loading saves.
        prefill: with the compressed cache.
        save, load: of the file.
    """

    prefill_full: tuple[float, ...]
    prefill: tuple[float, ...]
    save: tuple[float, ...]
    load: tuple[float, ...]


@torch.no_grad()
def measure_continuation(
    model: PreTrainedModel,
    windows: Tensor,
    context: int,
    new_cache: Callable[[], KVCarCache],
    prefill_chunk: int = PREFILL_CHUNK_TOKENS,
    chunk: int = CHUNK_TOKENS,
    on_window: Callable[[int], None] | None = None,
) -> Continuation:
    """Store the first ``context`` tokens of every window, load them, and step over those that follow.

    Args:
        model: an attached model.
        windows: token ids int64 ``[N, context + following + 1]``; the last one is only predicted.
        context: tokens stored.
        new_cache: makes an empty cache.
        prefill_chunk: tokens of the context computed at once, with both caches.
        chunk: following tokens fed at once.
        on_window: called after every window with how many are done.

    Raises:
        InputError: windows that leave nothing to follow.
    """
    if windows.ndim != 2 or windows.shape[0] == 0 or windows.shape[1] < context + 2 or context < 1:
        raise InputError(
            f"windows of shape {tuple(windows.shape)} leave no tokens to score after a context of {context}; give at "
            f"least {context + 2} tokens in each"
        )
    scores, file_bytes, full_bytes = TokenScores(), 0.0, 0.0
    for index, window in enumerate(windows.to(device_of(model))):
        full, cache = DynamicCache(config=model.config), new_cache()
        for each in (full, cache):
            prefill(model, each, window[None, :context], prefill_chunk)
        full_bytes += bfloat16_bytes(full) / len(windows)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "context"
            cache.save(path)
            file_bytes += path.stat().st_size / len(windows)
            loaded = KVCarCache.load(path, model, cache.bundle)
        for start in range(context, len(window) - 1, chunk):
            stop = min(start + chunk, len(window) - 1)
            logits, reference = (step_logits(model, window[start:stop], each) for each in (loaded, full))
            scores.add(logits, reference, window[start + 1 : stop + 1])
        if on_window is not None:
            on_window(index + 1)
    return _summarise(scores, windows.shape, context, file_bytes, full_bytes)


@torch.no_grad()
def time_context(
    model: PreTrainedModel,
    ids: Tensor,
    new_cache: Callable[[], KVCarCache],
    repeats: int = 3,
    prefill_chunk: int = PREFILL_CHUNK_TOKENS,
) -> ContextTimes:
    """Compute, store and load the context ``ids`` int64 ``[1, context]``, ``repeats`` times in turn.

    The file is read from the system's memory, not from a cold disk.
    """
    times: dict[str, list[float]] = {"prefill_full": [], "prefill": [], "save": [], "load": []}

    def timed(what: str, work: Callable[[], object]) -> None:
        began = time.perf_counter()
        work()
        times[what].append(time.perf_counter() - began)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "context"
        for _ in range(repeats):
            full, cache = DynamicCache(config=model.config), new_cache()
            timed("prefill_full", lambda full=full: prefill(model, full, ids, prefill_chunk))
            timed("prefill", lambda cache=cache: prefill(model, cache, ids, prefill_chunk))
            timed("save", lambda cache=cache: cache.save(path))
            timed("load", lambda cache=cache: KVCarCache.load(path, model, cache.bundle))
    return ContextTimes(**{what: tuple(seconds) for what, seconds in times.items()})


def continuation_figures(c: Continuation) -> dict[str, Any]:
    """Collect figures for a record; names carry units, divergences are in nats per token."""
    names = ("perplexity", "perplexity_full", "perplexity_ratio", "kl_divergence", "same_top")
    return estimate_figures(c, names) | {
        "window_kl_divergences": list(c.window_kl_divergences),
        "file_bytes": c.file_bytes,
        "full_bytes": c.full_bytes,
        "times_smaller": c.times_smaller,
        "file_bytes_per_token": c.file_bytes / c.context,
        "context": c.context,
        "following": c.following,
        "windows": c.windows,
    }


def _summarise(
    scores: TokenScores, shape: torch.Size, context: int, file_bytes: float, full_bytes: float
) -> Continuation:
    nll, nll_full = torch.cat(scores.nll), torch.cat(scores.nll_full)
    divergence = torch.cat(scores.divergence)
    following = shape[1] - context - 1
    return Continuation(
        perplexity=mean_of(nll).exponential(),
        perplexity_full=mean_of(nll_full).exponential(),
        perplexity_ratio=ratio_of(nll, nll_full),
        kl_divergence=mean_of(divergence),
        same_top=mean_of(torch.cat(scores.same_top)),
        window_kl_divergences=tuple(divergence.view(shape[0], following).mean(1).tolist()),
        file_bytes=file_bytes,
        full_bytes=full_bytes,
        context=context,
        following=following,
        windows=shape[0],
    )
