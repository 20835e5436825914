"""Quality of a cache against the same model's full cache, teacher-forced and stepped through both.

``model(input_ids)`` never reads a cache, so a cache looks perfect there. Here the text is fed in chunks of a page;
each chunk attends over what the cache made of the chunks before. Both caches see the same tokens in the same chunks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from ..bundle import Bundle
from ..cache.attach import attach, attachment_of
from ..cache.cache import KVCarCache
from ..errors import InputError, require
from ..models.structure import cache_argument, model_of
from ..models.weights import device_of
from ..progress import OnProgress, counter, silent
from ..text import Texts, checked_token_ids, evaluation_texts, token_windows
from .memory import bfloat16_bytes, kept_bytes

CHUNK_TOKENS = 64
_CONTEXT = 2048


@dataclass(frozen=True)
class Estimate:
    """A figure and its standard error."""

    value: float
    stderr: float

    def exponential(self) -> Estimate:
        """Of the figure's exponential, by the delta method (a mean log-likelihood becomes a perplexity)."""
        value = math.exp(self.value)
        return Estimate(value, value * self.stderr)


def estimate_figures(x: object, names: Sequence[str]) -> dict[str, float]:
    """Collect ``name`` and ``name_stderr`` of attributes of ``x`` that are estimates, in this order."""
    figures: dict[str, float] = {}
    for name in names:
        estimate: Estimate = getattr(x, name)
        figures |= {name: estimate.value, f"{name}_stderr": estimate.stderr}
    return figures


def mean_of(x: Tensor) -> Estimate:
    """Take the mean of ``x`` ``[N]``; the standard error of a single token is not known and said to be NaN."""
    if len(x) < 2:
        return Estimate(float(x.mean()), math.nan)
    return Estimate(float(x.mean()), float(x.std() / math.sqrt(len(x))))


def ratio_of(nll: Tensor, nll_reference: Tensor) -> Estimate:
    """Take the ratio of two perplexities on the same tokens; pairing the tokens makes its error far smaller than theirs."""
    return mean_of(nll - nll_reference).exponential()


@runtime_checkable
class CountsBytes(Protocol):
    """A cache that says itself what it stores, as ``KVCarCache`` does."""

    def stored_bytes(self) -> int:
        """Count the bytes of everything that this cache stores, or would store, for the tokens it has seen."""
        ...


def stored_bytes(cache: Cache) -> int:
    """Count the bytes of any cache: as it does itself, or its tensors where it is one of transformers'."""
    if isinstance(cache, KVCarCache):
        return cache.stored_bytes(in_bfloat16=True)
    return cache.stored_bytes() if isinstance(cache, CountsBytes) else kept_bytes(cache)


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


@dataclass(frozen=True, repr=False)
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
        codec_bytes: bytes of the codecs beside the cache as they lie in memory, all copies that kernels made counted, once for
            all sequences; 0 for caches without.
        tokens: tokens scored; context: tokens of a window; windows: how many.
        finer_page_share: share of the coded tokens, 0 to 1, read exactly as their pages would have cost too much as codes;
            their bytes are counted.
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
    codec_bytes: int
    tokens: int
    context: int
    windows: int
    finer_page_share: float = 0.0

    def __repr__(self) -> str:
        """One line: quality, size, and over how much text."""
        kl, ratio, size = self.kl_divergence, self.perplexity_ratio, self.times_smaller
        times = f"{size:.2f} times smaller" if size >= 1 else f"{1 / size:.2f} times larger"
        return (
            f"<Fidelity: KL divergence {kl.value:.5f} ± {kl.stderr:.5f} nats per token, perplexity x {ratio.value:.4f} ± "
            f"{ratio.stderr:.4f}, same top token {100 * self.same_top.value:.2f} %; {times} at {self.context:,} tokens; "
            f"{self.windows} windows>"
        )

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
        """Bytes of the model's own cache over bytes of this one; codecs are in neither."""
        return self.full_bytes / self.stored_bytes

    @property
    def times_smaller_in_use(self) -> float:
        """The same with the codecs, of one sequence."""
        return self.full_bytes / (self.stored_bytes + self.codec_bytes)


def evaluate(
    model: PreTrainedModel,
    bundle: Bundle | str | Path,
    tokenizer: Any = None,
    text: Texts = None,
    *,
    token_ids: Tensor | None = None,
    context: int | None = None,
    windows: int = 2,
    window: int | None = None,
    keep_decoded: bool = False,
    on_progress: OnProgress = silent,
) -> Fidelity:
    """Measure a bundle against the model's own full cache, stepped through both.

    Args:
        model: a causal language model, attached or not.
        bundle: a bundle fitted for it, or its folder.
        tokenizer: the model's.
        text: a text, the path of a ``.txt`` or ``.jsonl`` file, or a list of these; by default the part of the embedded
            English text that no fit reads by default.
        token_ids: int64 ``[N, T]`` in place of tokenizer and text.
        context: tokens of a window of text; 2,048 by default, or as many as the model has positions.
        windows: how many, spread evenly over each text.
        window: recent tokens kept exact; the bundle's by default.
        keep_decoded: decode pages once, in float32, and keep what comes out, instead of reading them with the kernels that users
            get; faster at long contexts.
        on_progress: called with (what is being done, tokens done, tokens in all).

    Raises:
        InputError: neither or both of text and token ids, or a text that is too short.
        ModelMismatchError: the bundle was fitted for another model.
    """
    model = model_of(model, "evaluate")
    require(int, windows=windows)
    require(Callable, on_progress=on_progress)
    require(int, optional=True, context=context)
    loaded = bundle if isinstance(bundle, Bundle) else Bundle.from_pretrained(bundle)
    KVCarCache(loaded, window)  # a window that cannot be is refused before the work
    if token_ids is None:
        context = evaluation_context(context, loaded.plan.geometry.max_positions)
        token_ids = _windows(tokenizer, text, context, windows)
    elif not (tokenizer is None and text is None and context is None):
        raise InputError("token_ids stand in place of tokenizer, text and context; give one or the other")
    token_ids = checked_token_ids(token_ids, model.config.get_text_config().vocab_size)
    attached = nullcontext() if attachment_of(model) else attach(model, loaded, window)
    with attached:
        on_chunk = counter(on_progress, "evaluate", token_ids.numel())
        caches = {"bundle": lambda: KVCarCache(loaded, window, keep_decoded)}
        return measure_fidelity(model, token_ids, caches, on_chunk)["bundle"]


def evaluation_context(asked: int | None, positions: int) -> int:
    """Choose the tokens of a window: as asked, or 2,048 or what the model has; raises InputError above that."""
    context = min(_CONTEXT, positions) if asked is None else asked
    if context > positions:
        raise InputError(f"a context of {context} tokens is longer than the model's {positions} positions")
    return context


def _windows(tokenizer: Any, text: Texts, context: int, windows: int) -> Tensor:
    if tokenizer is None:
        raise InputError("evaluation needs a tokenizer for its text, or token_ids in place of both")
    if not callable(tokenizer):
        raise InputError(f"a tokenizer is what the model's text goes through, got {tokenizer!r}")
    return torch.cat([token_windows(tokenizer, each.text, context, windows) for each in evaluation_texts(text)])


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
        on_chunk: called after every chunk with the tokens it had.
        chunk: tokens fed at once.

    Raises:
        InputError: windows of fewer than 2 tokens.
    """
    model = model_of(model, "measure_fidelity")
    require(Tensor, windows=windows)
    if windows.ndim != 2 or windows.shape[0] == 0 or windows.shape[1] < 2:
        raise InputError(
            f"evaluation needs windows of at least 2 tokens, got token ids of shape {tuple(windows.shape)}"
        )
    scores = {name: TokenScores() for name in caches}
    stored = dict.fromkeys(caches, 0.0)
    full_bytes, codec_bytes, finer = 0.0, dict.fromkeys(caches, 0), dict.fromkeys(caches, 0.0)
    for window in windows:
        full = DynamicCache(config=model.config)
        stepped = {name: make() for name, make in caches.items()}
        for ids, targets in _chunks(window.to(device_of(model)), chunk):
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
            if isinstance(cache, KVCarCache):
                codec_bytes[name] = cache.codec_bytes_in_use()
                finer[name] += cache.finer_page_share() / len(windows)
    return {
        name: _summarise(scores[name], windows, stored[name], full_bytes, codec_bytes[name], finer[name])
        for name in caches
    }


def _chunks(window: Tensor, chunk: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut into token ids of each chunk and the tokens that follow them (one fewer at the end of the window)."""
    for start in range(0, len(window), chunk):
        yield window[start : start + chunk], window[start + 1 : start + chunk + 1]


def step_logits(model: PreTrainedModel, ids: Tensor, cache: Cache) -> Tensor:
    """Compute logits ``[T, V]`` of one step over ``ids`` int64 ``[T]``, which are in the cache then."""
    return model(input_ids=ids[None], **cache_argument(model, cache), use_cache=True).logits[0]


def _summarise(
    scores: TokenScores, windows: Tensor, stored_bytes: float, full_bytes: float, codec_bytes: int, finer: float
) -> Fidelity:
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
        codec_bytes=codec_bytes,
        tokens=len(nll),
        context=context,
        windows=count,
        finer_page_share=finer,
    )


def fidelity_figures(f: Fidelity) -> dict[str, Any]:
    """Collect figures for a record; names carry units, divergences are in nats per token."""
    names = ("perplexity", "perplexity_full", "perplexity_ratio", "kl_divergence", "same_top")
    return estimate_figures(f, names) | {
        "kl_divergence_worst_1_percent": f.kl_divergence_worst_1_percent,
        "window_kl_divergences": list(f.window_kl_divergences),
        "stored_bytes": f.stored_bytes,
        "full_bytes": f.full_bytes,
        "codec_bytes": f.codec_bytes,
        "finer_page_share": f.finer_page_share,
        "stored_bytes_per_token": f.stored_bytes_per_token,
        "full_bytes_per_token": f.full_bytes_per_token,
        "times_smaller": f.times_smaller,
        "times_smaller_in_use": f.times_smaller_in_use,
        "tokens": f.tokens,
        "context": f.context,
        "windows": f.windows,
    }
