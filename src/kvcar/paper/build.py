"""Bundles of settings: made in order, kept in a folder, made only once."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ..bundle import Bundle
from ..errors import InputError
from ..fit.fit import fit_bundle
from ..fit.options import FitOptions
from .requantize import keep_layers, requantize
from .similarity import Similarity, measure_similarity
from ..text import TextSource, interleaved, joined, read_text, token_windows
from ..models.load import LoadedModel, load_model
from ..plan import Reuse
from .reuse import Candidate, choose_reuses
from ..progress import OnProgress
from ..record import Record
from ..geometry import Slot
from .algorithm import train_bundle
from .effect import latents_by_effect
from .finetune import finetune_weights
from .harm import measure_harm
from .options import TrainOptions
from .run import OnStep
from .config import Reproduction, ReuseChoice, Setting, TextPart

_SIMILARITY_WINDOWS, _HARM_WINDOWS, _HARM_CONTEXT = 16, 2, 256


class Builder:
    """Makes the bundles of a reproduction.

    Args:
        config: the whole file.
        folder: where bundles, tuned models and training checkpoints lie.
        records: where records go.
        on_progress, on_step: told what is going on.
    """

    def __init__(
        self, config: Reproduction, folder: Path, records: Path, on_progress: OnProgress, on_step: OnStep
    ) -> None:
        self._config, self._folder, self._records, self._tell = config, folder, records, on_progress
        self._on_step = on_step
        self._loaded: dict[str, LoadedModel] = {}
        self._windows: dict[tuple[TextPart, ...], tuple[Tensor, TextSource]] = {}
        self._similarity: Similarity | None = None
        self._candidates: dict[tuple[str, bool], list[Candidate]] = {}

    def model(self, dtype: str = "auto") -> LoadedModel:
        """The model in a dtype; only one is held at a time."""
        if dtype not in self._loaded:
            self._loaded.clear()
            self._loaded[dtype] = load_model(self._config.model, dtype, "auto", self._tell)
        return self._loaded[dtype]

    def bundle(self, setting: Setting) -> Bundle:
        """The bundle of a setting, made if it is not there yet."""
        path = self.path(setting.name)
        if not path.exists():
            self._make(setting).save(path, f"# {setting.name}\n\nMade by `kvcar reproduce`.\n")
        return Bundle.load(path)

    def path(self, name: str) -> Path:
        """Folder of a setting's bundle."""
        return self._folder / name

    def tuned_model(self, setting: Setting) -> Path:
        """Folder of the model that a setting tuned."""
        return self._folder / f"{setting.name}.model"

    def fit_windows(self) -> tuple[Tensor, TextSource]:
        """Windows of all fitting texts, taking turns so that any end of them has its share of each."""
        return self._windows_of(self._config.fit_texts)

    def train_windows(self) -> tuple[Tensor, TextSource]:
        """The same of the training texts."""
        return self._windows_of(self._config.train_texts or self._config.fit_texts)

    def _windows_of(self, texts: tuple[TextPart, ...]) -> tuple[Tensor, TextSource]:
        if texts not in self._windows:
            parts, sources = [], []
            for part in texts:
                source = read_text(part.text)
                tokenizer = self.model(next(iter(self._loaded), "auto")).tokenizer
                parts.append(token_windows(tokenizer, source.text, self._config.fit_context, part.windows))
                sources.append(source)
            self._windows[texts] = interleaved(parts), joined(sources)
        return self._windows[texts]

    def _make(self, setting: Setting) -> Bundle:
        if setting.base is not None:
            bundle = Bundle.load(self.path(setting.base))
            if setting.keep_layers is not None:
                bundle = keep_layers(bundle, setting.keep_layers)
            if setting.quantize is not None:
                windows, _ = self.fit_windows()
                model = self.model().model
                bundle = requantize(bundle, model, windows, setting.quantize.bits, setting.quantize.scales)
        else:
            bundle = self._fitted(setting)
        if setting.train is not None:
            bundle = self._trained(setting, bundle, setting.train)
        if setting.finetune is not None:
            bundle = self._finetuned(setting, bundle, setting.finetune)
        return bundle

    def _fitted(self, setting: Setting) -> Bundle:
        windows, source = self.fit_windows()
        given: dict[str, Any] = {"window": 0, "latent_bits": 16, "steps": 0} | (setting.fit or {"layers": ()})
        reuses = self._reuses(setting.reuse) if setting.reuse else ()
        options = _options(FitOptions, setting, given | {"reuses": reuses})
        model = self.model().model
        short = windows[:_HARM_WINDOWS, :_HARM_CONTEXT]
        allocate = None
        if setting.allocate == "effect":
            allocate = partial(latents_by_effect, model, short, on_progress=self._tell)
        return fit_bundle(model, self._config.model, windows, source, options, self._tell, allocate)

    def _reuses(self, choice: ReuseChoice) -> tuple[Reuse, ...]:
        key = (choice.measure, choice.any_head)
        if key not in self._candidates:
            self._candidates[key] = self._measure(*key)
        return choose_reuses(self._candidates[key], choice.count, dissimilar=choice.dissimilar)

    def _measure(self, measure: str, any_head: bool) -> list[Candidate]:
        windows, source = self.fit_windows()
        suffix = "-any" if any_head else ""
        path = self._records / f"similarity-{self._config.name}-{measure}{suffix}.json"
        config = {"model": self._config.model, "measure": measure, "any_head": any_head, "text": source.name}
        if (kept := _kept_candidates(path, config)) is not None:
            return kept
        model = self.model().model
        if self._similarity is None:
            self._similarity = measure_similarity(model, windows[:_SIMILARITY_WINDOWS], on_progress=self._tell)
        found = self._similarity
        candidates = found.candidates("relative_l1" if measure == "kl" else measure, any_head)
        if measure == "kl":
            candidates = measure_harm(
                model, windows[:_HARM_WINDOWS, :_HARM_CONTEXT], candidates, on_progress=self._tell
            )
        figures = {"candidates": [[list(c.slot), list(c.source), c.cost] for c in candidates], "tokens": found.tokens}
        Record("similarity", figures, config).write(path)
        return candidates

    def _trained(self, setting: Setting, bundle: Bundle, given: dict[str, Any]) -> Bundle:
        windows, source = self.train_windows()
        paper = given.get("paper", False)
        options = {k: v for k, v in given.items() if k != "paper"}
        make = TrainOptions.paper if paper else TrainOptions
        result = train_bundle(
            self.model(self._config.train_dtype).model, bundle, windows, source, _options(make, setting, options),
            self._folder / f"{setting.name}.training", self._resumes(setting), self._tell, self._on_step,
        )  # fmt: skip
        self._write_history(setting, options, result.history)
        return result.bundle

    def _finetuned(self, setting: Setting, bundle: Bundle, given: dict[str, Any]) -> Bundle:
        windows, source = self.train_windows()
        self._loaded.clear()
        loaded = self.model("float32")
        result = finetune_weights(
            loaded.model, bundle, windows, source, _options(TrainOptions, setting, given),
            checkpoint=self._folder / f"{setting.name}.training", resume=self._resumes(setting), on_progress=self._tell,
            on_step=self._on_step,
        )  # fmt: skip
        loaded.model.save_pretrained(self.tuned_model(setting))
        loaded.tokenizer.save_pretrained(self.tuned_model(setting))
        # The model in memory is no longer the one that was asked for.
        self._loaded.clear()
        self._write_history(setting, given, result.history)
        return result.bundle

    def _resumes(self, setting: Setting) -> bool:
        return (self._folder / f"{setting.name}.training").exists()

    def _write_history(self, setting: Setting, options: dict[str, Any], history: list[dict[str, Any]]) -> None:
        config = {"model": self._config.model, "setting": setting.model_dump(mode="json"), "options": options}
        Record("training", {"history": history}, config).write(
            self._records / f"training-{self._config.name}-{setting.name}.json"
        )


def _options(make: Any, setting: Setting, given: dict[str, Any]) -> Any:
    """Options from a setting; a name that does not exist is told with the setting's."""
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
