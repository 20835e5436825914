"""Running a reproduction: bundles, then evaluations side by side, then tasks; what is already there is not done again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..bundle import Bundle
from ..errors import InputError
from ..evaluate.fidelity import Fidelity, fidelity_figures, measure_fidelity
from ..sizes import compressed_size, full_size, parse_bytes, what_fits
from ..text import read_text, token_windows
from ..models.load import load_model
from ..progress import OnProgress, counter
from ..record import Record
from ..cache.attach import attach
from ..cache.cache import KVCarCache
from .run import OnStep, told_nobody
from .build import Builder
from .config import EvaluationText, Reproduction, Setting

_SIDE_BY_SIDE = 6
_REFERENCE_TOKENS = 4096


class Reproducer:
    """Everything that a configuration asks for.

    Args:
        config: see ``Reproduction``.
        folder: working folder for bundles, models and checkpoints.
        records: folder of records.
        on_progress, on_step: told what is going on.
    """

    def __init__(
        self, config: Reproduction, folder: Path, records: Path, on_progress: OnProgress, on_step: OnStep = told_nobody
    ) -> None:
        for each in (folder, records):
            try:
                each.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(f"cannot make the folder {each}: {error.strerror}") from None
        self._config, self._records, self._tell = config, records, on_progress
        self._builder = Builder(config, folder, records, on_progress, on_step)

    def run(self, only: Sequence[str] = (), tasks: bool = True) -> None:
        """Do all that is not done yet; ``only`` names settings to restrict it to (and "system"), ``tasks`` False leaves
        zero-shot tasks for later.

        Raises:
            InputError: a name that is not there.
        """
        known = {setting.name for setting in self._config.settings} | {"system"}
        if unknown := set(only) - known:
            raise InputError(f"no setting is called {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}")
        settings = [s for s in self._config.settings if not only or s.name in only]
        for setting in settings:
            self._builder.bundle(setting)
        for name, text in self._config.texts.items():
            self._evaluate(name, text, [s for s in settings if s.texts is None or name in s.texts])
        if tasks and self._config.tasks is not None:
            for setting in [None, *settings]:
                if setting is None or setting.tasks:
                    self._run_tasks(setting)
        if self._config.system is not None and (not only or "system" in only):
            self._system()

    # Text

    def _evaluate(self, name: str, text: EvaluationText, settings: Sequence[Setting]) -> None:
        pending = [s for s in settings if not self._record(f"fidelity-{name}", s).exists()]
        plain = [s for s in pending if s.finetune is None]
        for first in range(0, len(plain), _SIDE_BY_SIDE):
            self._evaluate_some(name, text, plain[first : first + _SIDE_BY_SIDE])
        for setting in pending:
            if setting.finetune is not None:
                self._evaluate_some(name, text, [setting], self._builder.tuned_model(setting))

    def _evaluate_some(
        self, name: str, text: EvaluationText, settings: Sequence[Setting], tuned: Path | None = None
    ) -> None:
        loaded = self._builder.model() if tuned is None else load_model(str(tuned), "auto", "auto", self._tell)
        source = read_text(text.text)
        windows = token_windows(loaded.tokenizer, source.text, text.context, text.windows)
        bundles = {s.name: self._builder.bundle(s) for s in settings}
        count = counter(self._tell, f"evaluate on {name}: {', '.join(bundles)}", windows.numel())
        with attach(loaded.model, next(iter(bundles.values())), 0):
            caches = {each: (lambda b=bundle: KVCarCache(b, 0, keep_decoded=True)) for each, bundle in bundles.items()}
            results = measure_fidelity(loaded.model, windows, caches, count, text.step_tokens)
        for setting in settings:
            config = self._config_of(setting, bundles[setting.name]) | {
                "text": source.name, "text_sha256": source.sha256, "text_name": name, "step_tokens": text.step_tokens,
                "window": 0, "tuned_model": tuned is not None, "dtype": str(loaded.model.dtype),
            }  # fmt: skip
            result = results[setting.name]
            figures = fidelity_figures(result) | self._sizes(bundles[setting.name], result)
            Record("paper-fidelity", figures, config).write(self._record(f"fidelity-{name}", setting))

    def _sizes(self, bundle: Bundle, result: Fidelity) -> dict[str, float]:
        """Saving at a common length, by the arithmetic that the runtime's tensors obey."""
        tokens = min(_REFERENCE_TOKENS, bundle.plan.geometry.max_positions)
        stored, full = compressed_size(bundle.plan, 2)(tokens, 1), full_size(bundle.plan.geometry)(tokens, 1)
        return {
            "reference_tokens": tokens,
            "saved_percent": 100 * (1 - stored / full),
            "saved_percent_at_context": 100 * (1 - result.stored_bytes / result.full_bytes),
            "log_perplexity_difference": math.log(result.perplexity_ratio.value),
        }

    def _config_of(self, setting: Setting, bundle: Bundle) -> dict[str, Any]:
        plan = bundle.plan
        return {
            "reproduction": self._config.name, "model": self._config.model,
            "setting": setting.model_dump(mode="json", exclude_defaults=True), "layers": plan.geometry.layers,
            "compressed_layers": len({s.layer for b in plan.blocks for s in b.slots}), "reused_slots": len(plan.reuses),
            "slots": len(list(plan.geometry.slots())), "fit": bundle.fit.model_dump(mode="json"),
        }  # fmt: skip

    def _record(self, kind: str, setting: Setting | None) -> Path:
        return self._records / f"paper-{self._config.name}-{kind}-{setting.name if setting else 'full'}.json"

    # Tasks

    def _run_tasks(self, setting: Setting | None) -> None:
        from ..evaluate.tasks import KVCarLM, run_tasks

        given, path = self._config.tasks, self._record("tasks", setting)
        assert given is not None
        if path.exists():
            return
        if setting is not None and setting.finetune is not None:
            loaded = load_model(str(self._builder.tuned_model(setting)), given.dtype, "auto", self._tell)
        else:
            loaded = self._builder.model(given.dtype)
        bundle = None if setting is None else self._builder.bundle(setting)
        lm = KVCarLM(loaded.model, loaded.tokenizer, bundle, 0, given.step_tokens, given.batch_size)
        try:
            tasks = [Path(t) if t.endswith(".jsonl") else t for t in given.tasks]
            figures = {"tasks": run_tasks(lm, tasks, given.limit)}
        finally:
            lm.close()
        config = {"reproduction": self._config.name, "model": self._config.model, **given.model_dump(mode="json")}
        if setting is not None and bundle is not None:
            config |= self._config_of(setting, bundle)
        Record("paper-tasks", figures, config).write(path)

    # System

    def _system(self) -> None:
        given, path = self._config.system, self._record("system", None)
        assert given is not None
        if path.exists():
            return
        memory = parse_bytes(given.memory)
        bundles = {s.name: self._builder.bundle(s) for s in self._config.settings if s.name in given.settings}
        geometry = next(iter(bundles.values())).plan.geometry
        sizes = {"full": full_size(geometry)} | {n: compressed_size(b.plan, 2) for n, b in bundles.items()}
        unlimited = 2**40
        figures = {
            "memory_bytes": memory,
            "longest_tokens": {
                n: {str(b): what_fits(size, memory, b, 1, unlimited).longest_tokens for b in given.batches}
                for n, size in sizes.items()
            },
            "largest_batch": {
                n: {str(t): what_fits(size, memory, 1, t, unlimited).largest_batch for t in given.lengths}
                for n, size in sizes.items()
            },
        }
        figures["confirmed"] = self._confirm(bundles, memory)
        Record("paper-system", figures, {"reproduction": self._config.name, **given.model_dump(mode="json")}).write(
            path
        )

    def _confirm(self, bundles: dict[str, Bundle], memory: int) -> list[dict[str, Any]]:
        """Really run up to the budget, each in a process of its own."""
        from ..evaluate.memory import fill_memory

        given = self._config.system
        assert given is not None
        if torch.cuda.is_available():
            raise InputError("confirming by resident memory is for CPUs; leave confirm_batches empty on a GPU")
        runs = []
        for batch in given.confirm_batches:
            for name in (None, *bundles):
                folder = None if name is None else self._builder.path(name)
                run = fill_memory(self._config.model, folder, memory, batch, window=0, dtype=given.dtype)
                runs.append({"setting": name or "full", "batch": batch, **run})
                self._tell("confirm by running", len(runs), len(given.confirm_batches) * (1 + len(bundles)))
        return runs
