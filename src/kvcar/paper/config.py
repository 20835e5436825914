"""What ``kvcar paper reproduce`` reads: a YAML file of settings, strictly validated."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..errors import InputError

Positive = Annotated[int, Field(ge=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TextPart(_Strict):
    """So many windows of a text; ``file.jsonl[:500]`` takes its first 500 documents."""

    text: str
    windows: Positive


class EvaluationText(TextPart):
    """Windows to evaluate on, and how many tokens are fed at once."""

    context: Positive = 1024
    step_tokens: Positive = 64


class ReuseChoice(_Strict):
    """Which slots a setting shares: the ``count`` that cost least by a measure of Algorithm 2."""

    measure: Literal["l1", "kl"] = "kl"
    count: Positive
    any_head: bool = False


class Quantization(_Strict):
    """Bits of every latent of a finished bundle."""

    bits: Positive = 8
    scales: Literal["static", "dynamic"] = "dynamic"


class Setting(_Strict):
    """One row of a table: a bundle from scratch (``fit``) or from another setting's (``base``), then what is done to it.

    Attributes:
        name: of the bundle and its records.
        table: which table it belongs to.
        fit: options of ``Structure``, ``CacheConfig`` and ``FitOptions``, by name.
        reuse: slots to share; with ``fit``, its blocks leave them out.
        base: name of an earlier setting whose bundle this one starts from.
        keep_layers: of the base's coded layers, those that stay coded.
        quantize: of the base's latents.
        train: options of ``TrainOptions``.
        finetune: options of ``TrainOptions`` for tuning the model's own weights.
        texts: names of evaluation texts; all by default.
        tasks: whether zero-shot tasks are run.
        paper: figures of the paper to set beside it.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    table: str
    fit: dict[str, Any] | None = None
    reuse: ReuseChoice | None = None
    base: str | None = None
    keep_layers: tuple[int, ...] | None = None
    quantize: Quantization | None = None
    train: dict[str, Any] | None = None
    finetune: dict[str, Any] | None = None
    texts: tuple[str, ...] | None = None
    tasks: bool = False
    paper: str = ""

    @model_validator(mode="after")
    def _one_start(self) -> Setting:
        if (self.base is None) == (self.fit is None and self.reuse is None):
            raise ValueError(f"setting {self.name} needs fit or reuse, or the base of another setting")
        if self.base is None and (self.keep_layers is not None or self.quantize is not None):
            raise ValueError(f"setting {self.name}: keep_layers and quantize change a base")
        return self


class Tasks(_Strict):
    """Zero-shot tasks: names that the harness knows, or local ``.jsonl`` files; ``dtype`` is the model's."""

    tasks: tuple[str, ...]
    limit: Positive | None = None
    step_tokens: Positive = 1
    batch_size: Positive = 32
    dtype: str = "auto"


class System(_Strict):
    """How much fits into ``memory`` bytes, by arithmetic: longest sequence by batch size, largest batch by length."""

    memory: str
    batches: tuple[int, ...]
    lengths: tuple[int, ...]
    settings: tuple[str, ...]


class Reproduction(_Strict):
    """A whole file.

    Attributes:
        name: of the reproduction, in the names of its records.
        model: 'demo', a folder or a hub id.
        fit_texts: what closed forms are fitted on, heads compared on and steps of quantisers chosen on.
        fit_context: tokens of a window to fit or train on.
        train_texts: what is trained on, the last windows held out; ``fit_texts`` by default.
        train_dtype: dtype of the model while codecs are trained.
        texts: what is evaluated on, by name.
        settings: rows of the tables.
        tasks: zero-shot tasks.
        system: the table of what fits into memory.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    model: str
    fit_texts: tuple[TextPart, ...]
    fit_context: Positive = 512
    train_texts: tuple[TextPart, ...] | None = None
    train_dtype: str = "auto"
    texts: dict[str, EvaluationText]
    settings: tuple[Setting, ...]
    tasks: Tasks | None = None
    system: System | None = None

    @model_validator(mode="after")
    def _names_fit(self) -> Reproduction:
        seen: set[str] = set()
        for setting in self.settings:
            if setting.name in seen:
                raise ValueError(f"two settings are called {setting.name}")
            if setting.base is not None and setting.base not in seen:
                raise ValueError(f"setting {setting.name} starts from {setting.base}, which does not come before it")
            if unknown := set(setting.texts or ()) - set(self.texts):
                raise ValueError(f"setting {setting.name} names texts that are not there: {', '.join(sorted(unknown))}")
            seen.add(setting.name)
        if self.system is not None and (unknown := set(self.system.settings) - seen):
            raise ValueError(f"the system table names settings that are not there: {', '.join(sorted(unknown))}")
        return self


def read_config(path: Path) -> Reproduction:
    """Read and check a YAML file; raises InputError with the place and the reason."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        return Reproduction.model_validate(data)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not valid YAML: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the file"
        raise InputError(f"{path}, {place}: {first['msg']} (of {error.error_count()} problems)") from None
