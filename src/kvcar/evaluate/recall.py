"""Recall through a cache: whether a model still finds what lies far back, scored against the same model with its full cache.

Items that the full cache fails say nothing of a cache and are left out. Every answer is teacher-forced in one pass, and right where
each of its tokens is the likeliest: greedy generation would then write the same.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from ..bundle import Bundle
from ..cache.attach import attach, attachment_of, prefill
from ..cache.cache import KVCarCache
from ..context.stored import check_store
from ..errors import InputError, require
from ..models.structure import cache_argument, model_of
from ..models.weights import device_of
from ..progress import OnProgress, counter, silent
from .fidelity import Estimate, mean_of
from .recall_items import STORED_TASK, TASKS, Passage, Question, check_items, longest_passage, recall_passages

SURE_LEAD = 1.0
"""Nats by which each token of an answer leads all others where a model is sure of it: 2.7 times as likely as the next one."""
_TOGETHER = 8


@dataclass(frozen=True)
class RecallItem:
    """One answer, with the full cache and with another.

    Attributes:
        task: its task.
        size: how hard it is, see ``Question``.
        passage: the place of its passage among all.
        full_right, right: every token of the answer is the likeliest, with the full cache and with this one.
        kl_divergence: of the next-token distributions, full against this, nats, the mean over the answer.
        lead: nats by which the answer's tokens lead all others with the full cache, the least of them; below 0 where it is wrong.
    """

    task: str
    size: int
    passage: int
    full_right: bool
    right: bool
    kl_divergence: float
    lead: float = math.nan


@dataclass(frozen=True)
class Recall:
    """Recall of one cache over items of one task or of several.

    Attributes:
        items: all that were asked.
    """

    items: tuple[RecallItem, ...]

    @property
    def counted(self) -> tuple[RecallItem, ...]:
        """Items that the full cache gets right; the others are left out."""
        return tuple(item for item in self.items if item.full_right)

    @property
    def sure(self) -> Recall:
        """Of the counted items those that the full cache is sure of; the others are close calls, which any change turns both ways."""
        return Recall(tuple(item for item in self.counted if item.lead >= SURE_LEAD))

    @property
    def full_exact_match(self) -> float:
        """Share of all items, 0 to 1, that the full cache gets right."""
        return len(self.counted) / len(self.items) if self.items else math.nan

    @property
    def exact_match(self) -> Estimate:
        """Share of the counted items, 0 to 1, that this cache gets right too; its standard error takes passages as independent."""
        return _share(self.counted)

    @property
    def points_lost(self) -> Estimate:
        """How far that is below the full cache's 100 %, in points."""
        found = self.exact_match
        return Estimate(100 * (1 - found.value), 100 * found.stderr)

    @property
    def gained(self) -> int:
        """Items that only this cache gets right: so many of those lost may be close calls too."""
        return sum(item.right and not item.full_right for item in self.items)

    @property
    def kl_divergence(self) -> Estimate:
        """Over the answers of counted items, nats per token."""
        values = torch.tensor([item.kl_divergence for item in self.counted], dtype=torch.float64)
        return mean_of(values) if len(values) else Estimate(math.nan, math.nan)

    @property
    def tasks(self) -> dict[str, Recall]:
        """Of every task by itself."""
        names = dict.fromkeys(item.task for item in self.items)
        return {name: Recall(tuple(item for item in self.items if item.task == name)) for name in names}

    def __repr__(self) -> str:
        """One line: how many items, and what is lost."""
        lost, kl = self.points_lost, self.kl_divergence
        return (
            f"<Recall: {lost.value:.2f} ± {lost.stderr:.2f} points of exact match lost on {len(self.counted):,} items that the full "
            f"cache gets right (of {len(self.items):,}), KL divergence {kl.value:.5f} nats per token of the answers>"
        )


def evaluate_recall(
    model: PreTrainedModel,
    bundle: Bundle | str | Path,
    tokenizer: Any,
    *,
    items: int = 60,
    longest: int | None = None,
    tasks: Sequence[str] | None = None,
    window: int | None = None,
    seed: int = 0,
    on_progress: OnProgress = silent,
) -> Recall:
    """Measure whether a model still finds what lies far back in a bundle's cache; what is asked is generated.

    Args:
        model: a causal language model, attached or not.
        bundle: a bundle fitted for it, or its folder.
        tokenizer: the model's.
        items: questions of each task at least, see ``kvcar.evaluate.recall_items``.
        longest: tokens of the longest passage; 6,144 by default, or what the model's positions leave room for.
        tasks: copy, pairs, passkey, needles, repeated, turns; all by default.
        window: recent tokens kept exact; the bundle's by default.
        seed: of everything random.
        on_progress: called with (what is being done, tokens done, tokens in all).

    Raises:
        InputError: an unknown task, passages that cannot be, or the extra ``store`` is missing, with which the cache of "turns" is
            saved and loaded.
        ModelMismatchError: the bundle was fitted for another model.
    """
    model = model_of(model, "evaluate_recall")
    require(int, items=items, seed=seed)
    require(int, optional=True, longest=longest)
    if not callable(tokenizer):
        raise InputError(f"a tokenizer is what the model's text goes through, got {tokenizer!r}")
    loaded = bundle if isinstance(bundle, Bundle) else Bundle.from_pretrained(bundle)
    exact_tokens, longest = check_recall(loaded, items, longest, tasks, window)
    passages = recall_passages(tokenizer, items, seed=seed, exact_tokens=exact_tokens, longest=longest, tasks=tasks)
    with nullcontext() if attachment_of(model) else attach(model, loaded, window):
        count = counter(on_progress, "ask", sum(len(passage.ids) for passage in passages))
        return measure_recall(model, passages, {"bundle": lambda: KVCarCache(loaded, window)}, count)["bundle"]


def check_recall(
    bundle: Bundle, items: int, longest: int | None, tasks: Sequence[str] | None, window: int | None
) -> tuple[int, int]:
    """Refuse what ``evaluate_recall`` cannot do, before any work; find how many recent tokens may be exact, and the longest passage."""
    cache = KVCarCache(bundle, window)
    exact_tokens = cache.plan.window + cache.plan.page_tokens
    longest = longest_passage(bundle.plan.geometry.max_positions, longest)
    check_items(items, exact_tokens, longest, tasks)
    if STORED_TASK in (tasks or TASKS):
        check_store()
    return exact_tokens, longest


@torch.no_grad()
def measure_recall(
    model: PreTrainedModel,
    passages: Sequence[Passage],
    caches: Mapping[str, Callable[[], Cache]],
    on_passage: Callable[[int], None] | None = None,
    together: int = _TOGETHER,
) -> dict[str, Recall]:
    """Ask every question of every passage, of the full cache and of all others.

    Args:
        model: the model; attached, if a ``KVCarCache`` is among the caches.
        passages: what to read and to ask.
        caches: makes an empty cache of any kind, by name.
        on_passage: called after every passage with its tokens.
        together: questions of the same length that are asked as one batch; 1 for caches that hold one sequence.
    """
    model = model_of(model, "measure_recall")
    items: dict[str, list[RecallItem]] = {name: [] for name in caches}
    for index, passage in enumerate(passages):
        expected = list(_answers(model, DynamicCache(config=model.config), passage, together))
        for name, make in caches.items():
            for (question, full), (_, got) in zip(expected, _answers(model, make(), passage, together), strict=True):
                items[name].append(_item(passage.task, index, question, full, got))
        if on_passage is not None:
            on_passage(len(passage.ids))
    return {name: Recall(tuple(found)) for name, found in items.items()}


def _answers(
    model: PreTrainedModel, cache: Cache, passage: Passage, together: int
) -> Iterator[tuple[Question, Tensor]]:
    """Log-probabilities ``[tokens of the answer, V]`` after every question of a passage, read by ``cache`` once."""
    prefill(model, cache, torch.tensor([passage.ids], device=device_of(model)))
    if passage.stored and isinstance(cache, KVCarCache):
        cache = _saved_and_loaded(model, cache)
    alike = sorted(passage.questions, key=_lengths)
    for _, group in groupby(alike, _lengths):
        same = list(group)
        for first in range(0, len(same), together):
            batch = same[first : first + together]
            asked = deepcopy(cache)
            if len(batch) > 1:
                asked.reorder_cache(torch.zeros(len(batch), dtype=torch.int64, device=device_of(model)))  # pyright: ignore[reportArgumentType]
            ids = torch.tensor([[*q.ids, *q.answer[:-1]] for q in batch], device=device_of(model))
            logits = model(input_ids=ids, **cache_argument(model, asked), use_cache=True).logits
            answers = torch.log_softmax(logits[:, -len(batch[0].answer) :].float(), -1)
            yield from zip(batch, answers, strict=True)


def _lengths(question: Question) -> tuple[int, int]:
    return len(question.ids), len(question.answer)


def _saved_and_loaded(model: PreTrainedModel, cache: KVCarCache) -> KVCarCache:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "context"
        cache.save(path)
        return KVCarCache.load(path, model, cache.bundle, cache.plan.window)


def _item(task: str, passage: int, question: Question, full: Tensor, got: Tensor) -> RecallItem:
    answer = torch.tensor(question.answer, device=full.device)
    divergence = (full.exp() * (full - got)).sum(-1).clamp_min(0).double().mean()
    right = [bool((each.argmax(-1) == answer).all()) for each in (full, got)]
    return RecallItem(task, question.size, passage, right[0], right[1], float(divergence), _lead(full, answer))


def _lead(log_probabilities: Tensor, answer: Tensor) -> float:
    """The least lead of an answer's tokens in ``[tokens, V]``."""
    own = log_probabilities.gather(-1, answer[:, None])
    others = log_probabilities.scatter(-1, answer[:, None], -math.inf).amax(-1, keepdim=True)
    return float((own - others).min())


def _share(items: Sequence[RecallItem]) -> Estimate:
    """Share of items that are right, and its standard error where items of one passage are alike."""
    if not items:
        return Estimate(math.nan, math.nan)
    share = sum(item.right for item in items) / len(items)
    off: dict[int, float] = {}
    for item in items:
        off[item.passage] = off.get(item.passage, 0.0) + item.right - share
    if len(off) < 2:
        return Estimate(share, math.nan)
    variance = sum(x * x for x in off.values()) * len(off) / (len(off) - 1)
    return Estimate(share, math.sqrt(variance) / len(items))


def recall_figures(recall: Recall, with_items: bool = True) -> dict[str, Any]:
    """Collect figures for a record, of all items and of every task; divergences are in nats per token."""
    figures = _figures(recall) | {"tasks": {name: _figures(each) for name, each in recall.tasks.items()}}
    return figures | ({"items": [asdict(item) for item in recall.items]} if with_items else {})


def _figures(recall: Recall) -> dict[str, Any]:
    exact, lost, kl, sure = recall.exact_match, recall.points_lost, recall.kl_divergence, recall.sure
    return {
        "asked": len(recall.items),
        "counted": len(recall.counted),
        "full_exact_match": recall.full_exact_match,
        "exact_match": exact.value,
        "exact_match_stderr": exact.stderr,
        "points_lost": lost.value,
        "points_lost_stderr": lost.stderr,
        "gained": recall.gained,
        "sure": len(sure.items),
        "sure_points_lost": sure.points_lost.value,
        "sure_points_lost_stderr": sure.points_lost.stderr,
        "kl_divergence": kl.value,
        "kl_divergence_stderr": kl.stderr,
    }
