"""Running a reproduction: bundles of its settings, then evaluations side by side, then tasks, then what fits into memory.

Everything that is made is kept in a folder, everything that is measured in a record; what is already there is not done again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..bundle import Bundle, CodedBlock
from ..cache.attach import attach
from ..cache.cache import KVCarCache
from ..errors import InputError
from ..evaluate.fidelity import Fidelity, fidelity_figures, measure_fidelity
from ..fit.fit import fit_bundles
from ..fit.options import FitOptions, Structure
from ..geometry import Slot
from ..models.load import LoadedModel, load_model
from ..plan import Block, CacheConfig, Reuse
from ..progress import OnProgress, counter
from ..record import Record
from ..sizes import compressed_size, full_size, parse_bytes, what_fits
from ..text import TextSource, interleaved, joined, read_text, token_windows
from .algorithm1 import train_bundle
from .algorithm2 import Candidate, choose_reuses, find_candidates, shared_bundle
from .config import EvaluationText, Reproduction, ReuseChoice, Setting, TextPart
from .finetune import finetune_weights
from .options import OnStep, TrainOptions, ignore
from .quantize import quantize_latents

_SIMILARITY_WINDOWS = 16
_SIDE_BY_SIDE = 6
_REFERENCE_TOKENS = 4096
_NO_LIMIT = 2**40


class Builder:
    """Makes the bundles of a reproduction.

    Args:
        config: the whole file.
        folder: where bundles, tuned models and training checkpoints lie.
        records: where records go.
        on_progress, on_step: called as it goes.
    """

    def __init__(
        self, config: Reproduction, folder: Path, records: Path, on_progress: OnProgress, on_step: OnStep
    ) -> None:
        self._config, self._folder, self._records = config, folder, records
        self._on_progress, self._on_step = on_progress, on_step
        self._loaded: dict[str, LoadedModel] = {}
        self._windows: dict[tuple[TextPart, ...], tuple[Tensor, TextSource]] = {}

    def model(self, dtype: str = "auto") -> LoadedModel:
        """Load the model in a dtype; only one is in memory at a time."""
        if dtype not in self._loaded:
            self._loaded.clear()
            self._loaded[dtype] = load_model(self._config.model, dtype, "auto", self._on_progress)
        return self._loaded[dtype]

    def bundle(self, setting: Setting) -> Bundle:
        """Read the bundle of a setting, made if it is not there yet."""
        path = self._folder / setting.name
        if not path.exists():
            self._make(setting).save_pretrained(path)
        return Bundle.from_pretrained(path)

    def tuned_model(self, setting: Setting) -> Path:
        """Name the folder of the model that a setting tuned."""
        return self._folder / f"{setting.name}.model"

    def _make(self, setting: Setting) -> Bundle:
        bundle = self._fitted(setting) if setting.base is None else Bundle.from_pretrained(self._folder / setting.base)
        if setting.keep_layers is not None:
            bundle = keep_layers(bundle, setting.keep_layers)
        if setting.quantize is not None:
            windows, _ = self._windows_of(self._config.fit_texts)
            given = setting.quantize
            bundle = quantize_latents(bundle, self.model().model, windows, given.bits, given.scales)
        if setting.train is not None:
            bundle = self._trained(setting, bundle, setting.train)
        if setting.finetune is not None:
            bundle = self._finetuned(setting, bundle, setting.finetune)
        return bundle

    def _fitted(self, setting: Setting) -> Bundle:
        windows, source = self._windows_of(self._config.fit_texts)
        reuses = self._reuses(setting.reuse) if setting.reuse else ()
        model, name = self.model().model, self._config.model
        if setting.fit is None:
            return shared_bundle(model, name, windows, source, reuses, window=0)
        given = {"latent_bits": 16, "steps": 0, "window": 0, **setting.fit, "reuses": reuses}
        own = {name: value for name, value in given.items() if name in _names(Structure)}
        cache = {name: value for name, value in given.items() if name in _names(CacheConfig)}
        rest = {name: value for name, value in given.items() if name not in own | cache}
        options = _options(
            FitOptions,
            setting,
            rest | {"structure": _options(Structure, setting, own), "cache": _options(CacheConfig, setting, cache)},
        )
        return next(fit_bundles(model, windows, [options], source, name, self._on_progress))

    def _reuses(self, choice: ReuseChoice) -> tuple[Reuse, ...]:
        """Choose slots from a record of the same measurement, made if it is not there yet."""
        windows, source = self._windows_of(self._config.fit_texts)
        suffix = "-any" if choice.any_head else ""
        path = self._records / f"similarity-{self._config.name}-{choice.measure}{suffix}.json"
        config = {
            "model": self._config.model, "measure": choice.measure, "any_head": choice.any_head, "text": source.name
        }  # fmt: skip
        candidates = _kept_candidates(path, config)
        if candidates is None:
            candidates = find_candidates(
                self.model().model, windows[:_SIMILARITY_WINDOWS], choice.measure, choice.any_head,
                on_progress=self._on_progress,
            )  # fmt: skip
            figures = {"candidates": [[list(c.slot), list(c.source), c.cost] for c in candidates]}
            Record("similarity", figures, config).write(path)
        return choose_reuses(candidates, choice.count)

    def _trained(self, setting: Setting, bundle: Bundle, given: dict[str, Any]) -> Bundle:
        windows, source = self._train_windows()
        options = {k: v for k, v in given.items() if k != "paper"}
        make = TrainOptions.paper if given.get("paper", False) else TrainOptions
        result = train_bundle(
            self.model(self._config.train_dtype).model, bundle, windows, source, _options(make, setting, options),
            on_progress=self._on_progress, on_step=self._on_step, **self._checkpoint(setting),
        )  # fmt: skip
        self._write_history(setting, options, result.history)
        return result.bundle

    def _finetuned(self, setting: Setting, bundle: Bundle, given: dict[str, Any]) -> Bundle:
        windows, source = self._train_windows()
        self._loaded.clear()
        loaded = self.model("float32")
        result = finetune_weights(
            loaded.model, bundle, windows, source, _options(TrainOptions, setting, given),
            on_progress=self._on_progress, on_step=self._on_step, **self._checkpoint(setting),
        )  # fmt: skip
        loaded.model.save_pretrained(self.tuned_model(setting))
        loaded.tokenizer.save_pretrained(self.tuned_model(setting))
        # The model in memory is no longer the one that was asked for.
        self._loaded.clear()
        self._write_history(setting, given, result.history)
        return result.bundle

    def _checkpoint(self, setting: Setting) -> dict[str, Any]:
        folder = self._folder / f"{setting.name}.training"
        return {"checkpoint": folder, "resume": folder.exists()}

    def _write_history(self, setting: Setting, options: dict[str, Any], history: list[dict[str, Any]]) -> None:
        config = {"model": self._config.model, "setting": setting.model_dump(mode="json"), "options": options}
        path = self._records / f"training-{self._config.name}-{setting.name}.json"
        Record("training", {"history": history}, config).write(path)

    def _train_windows(self) -> tuple[Tensor, TextSource]:
        return self._windows_of(self._config.train_texts or self._config.fit_texts)

    def _windows_of(self, texts: tuple[TextPart, ...]) -> tuple[Tensor, TextSource]:
        """Windows of several texts, taking turns so that any end of them has its share of each."""
        if texts not in self._windows:
            tokenizer, context = self.model(next(iter(self._loaded), "auto")).tokenizer, self._config.fit_context
            sources = [read_text(part.text) for part in texts]
            parts = [
                token_windows(tokenizer, source.text, context, part.windows)
                for part, source in zip(texts, sources, strict=True)
            ]
            self._windows[texts] = interleaved(parts), joined(sources)
        return self._windows[texts]


class Reproducer:
    """Everything that a configuration asks for.

    Args:
        config: see ``Reproduction``.
        folder: working folder for bundles, models and checkpoints.
        records: folder of records.
        on_progress, on_step: called as it goes.
    """

    def __init__(
        self, config: Reproduction, folder: Path, records: Path, on_progress: OnProgress, on_step: OnStep = ignore
    ) -> None:
        for each in (folder, records):
            try:
                each.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(f"cannot make the folder {each}: {error.strerror}") from None
        self._config, self._records, self._on_progress = config, records, on_progress
        self._builder = Builder(config, folder, records, on_progress, on_step)

    def run(self, only: Sequence[str] = (), tasks: bool = True) -> None:
        """Do all that is not done yet.

        Args:
            only: names of settings to restrict it to (and "system").
            tasks: whether zero-shot tasks are run.

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
        loaded = self._builder.model() if tuned is None else load_model(str(tuned), "auto", "auto", self._on_progress)
        source = read_text(text.text)
        windows = token_windows(loaded.tokenizer, source.text, text.context, text.windows)
        bundles = {s.name: self._builder.bundle(s) for s in settings}
        count = counter(self._on_progress, f"evaluate on {name}: {', '.join(bundles)}", windows.numel())
        with attach(loaded.model, next(iter(bundles.values())), 0):
            caches = {each: (lambda b=bundle: KVCarCache(b, 0)) for each, bundle in bundles.items()}
            results = measure_fidelity(loaded.model, windows, caches, count, text.step_tokens)
        for setting in settings:
            config = self._config_of(setting, bundles[setting.name]) | {
                "text": source.name, "text_sha256": source.sha256, "text_name": name, "step_tokens": text.step_tokens,
                "window": 0, "tuned_model": tuned is not None, "dtype": str(loaded.model.dtype),
            }  # fmt: skip
            result = results[setting.name]
            figures = fidelity_figures(result) | _sizes(bundles[setting.name], result)
            Record("paper-fidelity", figures, config).write(self._record(f"fidelity-{name}", setting))

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
            loaded = load_model(str(self._builder.tuned_model(setting)), given.dtype, "auto", self._on_progress)
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
        plans = {s.name: self._builder.bundle(s).plan for s in self._config.settings if s.name in given.settings}
        geometry = next(iter(plans.values())).geometry
        sizes = {"full": full_size(geometry)} | {name: compressed_size(plan, 2) for name, plan in plans.items()}
        figures = {
            "memory_bytes": memory,
            "longest_tokens": {
                name: {str(b): what_fits(size, memory, b, 1, _NO_LIMIT).longest_tokens for b in given.batches}
                for name, size in sizes.items()
            },
            "largest_batch": {
                name: {str(t): what_fits(size, memory, 1, t, _NO_LIMIT).largest_batch for t in given.lengths}
                for name, size in sizes.items()
            },
        }
        config = {"reproduction": self._config.name, **given.model_dump(mode="json")}
        Record("paper-system", figures, config).write(path)


def keep_layers(bundle: Bundle, layers: Collection[int]) -> Bundle:
    """Keep only the blocks and reuses of ``layers``; the others become exact.

    Raises:
        InputError: a block spans kept and dropped layers, or nothing is left.
    """
    kept: list[tuple[Block, CodedBlock]] = []
    for block, coded in zip(bundle.plan.blocks, bundle.blocks, strict=True):
        inside = {slot.layer in layers for slot in block.slots}
        if len(inside) > 1:
            raise InputError(f"a block spans layers that are kept and layers that are not: {block.slots}")
        if inside == {True}:
            kept.append((block, coded))
    reuses = tuple(reuse for reuse in bundle.plan.reuses if reuse.slot.layer in layers)
    if not kept and not reuses:
        raise InputError(f"nothing of the bundle is in layers {sorted(layers)}")
    plan = bundle.plan.model_copy(update={"blocks": tuple(block for block, _ in kept), "reuses": reuses})
    # Copied plans are not validated again and must not keep what was derived from the old one.
    plan = type(plan).model_validate(plan.model_dump())
    return replace(bundle, plan=plan, blocks=tuple(coded for _, coded in kept))


def _names(options: type) -> set[str]:
    return {each.name for each in fields(options)}


def _options(make: Any, setting: Setting, given: dict[str, Any]) -> Any:
    """Options from a setting; an error names the setting."""
    try:
        return make(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})
    except (TypeError, InputError) as error:
        raise InputError(f"setting {setting.name}: {error}") from None


def _kept_candidates(path: Path, config: dict[str, Any]) -> list[Candidate] | None:
    """Candidates that a record of the same measurement holds, None where there is no such record."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if record.get("config") != config:
        return None
    return [Candidate(Slot(*slot), Slot(*source), cost) for slot, source, cost in record["candidates"]]


def _sizes(bundle: Bundle, result: Fidelity) -> dict[str, float]:
    """Saving at a common length, by the arithmetic that the runtime's tensors obey."""
    tokens = min(_REFERENCE_TOKENS, bundle.plan.geometry.max_positions)
    stored, full = compressed_size(bundle.plan, 2)(tokens, 1), full_size(bundle.plan.geometry)(tokens, 1)
    return {
        "reference_tokens": tokens,
        "saved_percent": 100 * (1 - stored / full),
        "saved_percent_at_context": 100 * (1 - result.stored_bytes / result.full_bytes),
        "log_perplexity_difference": math.log(result.perplexity_ratio.value),
    }
