"""Zero-shot tasks through the compressed cache, run by lm-evaluation-harness (the extra ``tasks``).

The harness scores texts in one pass without a cache, where any cache looks perfect. ``KVCarLM`` feeds them a few tokens
at a time, so that every token reads what the cache made of the ones before; generation goes through the cache too.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import Cache, DynamicCache, PreTrainedModel

from ..bundle import Bundle
from ..cache.attach import attach
from ..cache.cache import KVCarCache
from ..errors import InputError
from .scoring import Scorer, alike_together

try:
    import lm_eval
    from lm_eval.models import huggingface
    from lm_eval.tasks import TaskManager
except ImportError:
    raise InputError("tasks need lm-evaluation-harness; install it with: pip install 'kvcar[tasks]'") from None


# The harness' decorators hide what they decorate from type checkers.
_HFLM: Any = huggingface.HFLM
_simple_evaluate: Any = lm_eval.simple_evaluate

_Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""Its texts, for the harness' own cache of responses; ids of the context and of the continuation."""

# Above 0 turns standard errors on; those of means have a closed form.
_BOOTSTRAP = 1000


class KVCarLM(_HFLM):
    """A model of the harness whose log-likelihoods and generation go through a cache.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        bundle: what compresses the cache; None steps through transformers' own full cache, which gives the numbers of
            the harness' ``hf`` model.
        window: recent tokens kept exact. 0 by default: task texts are short, and with a window their tokens would all
            be in it.
        step_tokens: tokens fed at once, which see each other exactly.
        batch_size: texts run together.

    Raises:
        InputError: ``step_tokens`` is below 1, or the tokenizer has no token to start a text with.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        bundle: Bundle | None,
        window: int = 0,
        step_tokens: int = 1,
        batch_size: int = 32,
    ) -> None:
        if step_tokens < 1:
            raise InputError(f"step_tokens must be at least 1, got {step_tokens}")
        if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
            raise InputError(
                "the tokenizer has neither a beginning nor an end token, and the harness starts each text with one; "
                "set tokenizer.eos_token"
            )
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        self._bundle, self._window = bundle, window
        self._attachment = None if bundle is None else attach(model, bundle, window)
        self._scorer = Scorer(model, self.new_cache, step_tokens)

    def close(self) -> None:
        """Detach the model."""
        if self._attachment is not None:
            self._attachment.detach()

    def new_cache(self) -> Cache:
        """Make an empty cache of the kind that is measured."""
        if self._bundle is None:
            return DynamicCache(config=self.model.config)
        return KVCarCache(self._bundle, self._window)

    def _loglikelihood_tokens(
        self, requests: Sequence[_Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Find log-likelihood and whether it is greedy, of each continuation in ``requests``, in their order."""
        size = override_bs or int(self.batch_size)
        texts = [self._cut(context, continuation) for _, context, continuation in requests]
        order = alike_together(texts)
        found: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(texts), disable=disable_tqdm, desc="stepping through the cache") as bar:
            for first in range(0, len(order), size):
                batch = order[first : first + size]
                for index, scored in zip(batch, self._scorer.score([texts[i] for i in batch]), strict=True):
                    found[index] = (scored.log_likelihood, scored.greedy)
                    if requests[index][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[index][0], found[index])
                bar.update(len(batch))
        return [found[index] for index in range(len(texts))]

    def _cut(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """Take a text's end, as the harness cuts what is longer than the model's positions."""
        kept = self.max_length + 1 - len(continuation)
        if kept < 1:
            raise InputError(
                f"a continuation has {len(continuation)} tokens, but the model has {self.max_length} positions; leave its "
                "item out"
            )
        return context[-kept:], continuation


def local_task(path: Path) -> dict[str, Any]:
    """Make a task of the harness from a local ``.jsonl`` file.

    Lines are either ``query``, ``choices``, ``gold`` (PIQA's kind: which choice follows) or ``context_options``,
    ``continuation``, ``gold`` (WinoGrande's kind: after which context the continuation is likelier).

    Raises:
        InputError: the file is missing or its lines are of neither kind.
    """
    try:
        with path.open(encoding="utf-8") as lines:
            first = json.loads(lines.readline() or "null")
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the task {path}: {error}") from None
    fields = set(first) if isinstance(first, dict) else set()
    common = {
        "task": path.stem,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(path.absolute())}},
        "validation_split": "validation",
        "test_split": "validation",
        "output_type": "multiple_choice",
        "num_fewshot": 0,
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")],
        "metadata": {"version": 1.0},
    }
    if {"query", "choices", "gold"} <= fields:
        # The query ends in a line break; with "Answer:" it is the harness' own prompt for PIQA.
        return common | {"doc_to_text": "{{query}}Answer:", "doc_to_choice": "choices", "doc_to_target": "gold"}
    if {"context_options", "continuation", "gold"} <= fields:
        forms = {"doc_to_text": "gold", "doc_to_choice": "context_options", "doc_to_target": "continuation"}
        return common | forms | {"metric_list": common["metric_list"][:1]}
    raise InputError(
        f"{path} is no task: its lines need query, choices and gold, or context_options, continuation and gold; "
        f"the first has {', '.join(sorted(fields)) or 'none of them'}"
    )


def run_tasks(lm: KVCarLM, tasks: Sequence[str | Path], limit: int | None = None, seed: int = 0) -> dict[str, Any]:
    """Measure zero-shot results by task: ``acc``, ``acc_stderr``, ``acc_norm`` where there is one, ``items``.

    Args:
        lm: the model and cache to measure.
        tasks: names that the harness knows (fetched from the hub), or ``.jsonl`` files for ``local_task``.
        limit: items of each task, from the start; None for all.
        seed: of the harness.

    Raises:
        InputError: as ``check_tasks``.
    """
    given = [_known(task) for task in tasks]
    manager = _manager(any(isinstance(task, str) for task in tasks))
    results = _simple_evaluate(
        model=lm, tasks=given, task_manager=manager, limit=limit, bootstrap_iters=_BOOTSTRAP, random_seed=seed, numpy_random_seed=seed,
        torch_random_seed=seed, fewshot_random_seed=seed, log_samples=True, verbosity="ERROR",
    )  # fmt: skip
    found = {}
    for name, figures in results["results"].items():
        # Keys are "metric,filter"; only the filter "none" exists without post-processing.
        plain = {key.removesuffix(",none"): value for key, value in figures.items() if key.endswith(",none")}
        samples = results["samples"][name]
        plain["items"] = len(samples)
        plain["correct"] = [int(sample["acc"]) for sample in sorted(samples, key=lambda s: s["doc_id"])]
        found[name] = plain
    return found


def check_tasks(tasks: Sequence[str | Path]) -> None:
    """Refuse tasks that cannot be run, before anything is loaded for them; raises InputError."""
    for task in tasks:
        _known(task)


def _known(task: str | Path) -> str | dict[str, Any]:
    """A task as the harness takes it; raises InputError where there is none."""
    if isinstance(task, Path):
        return local_task(task)
    if not _manager(True).match_tasks([task]):
        raise InputError(
            f"the harness knows no task {task[:80]!r}; give a name that it lists (lm-eval ls tasks), or a .jsonl file"
        )
    return task


@cache
def _manager(defaults: bool) -> TaskManager:
    """Reading the harness' own thousands of tasks takes seconds, and local files need none of them."""
    return TaskManager(include_defaults=defaults)
