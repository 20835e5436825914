"""What training is asked for and gives: options, what is logged of every step, and what a bundle says of it afterwards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import Tensor
from transformers import PreTrainedModel

from ..bundle import Bundle, FitProvenance
from ..errors import InputError
from ..text import TextSource

OnStep = Callable[[dict[str, Any]], None]
"""Called with every step (``loss``) and every validation (``validation_loss``), with ``stage`` and ``step``."""


def ignore(entry: dict[str, Any]) -> None:
    """Do nothing with a step."""
    del entry


_CHOICES = {
    "objective": ("kl", "ce"),
    "joint_trains": ("encoders", "decoders", "all"),
    "start": ("bundle", "random"),
    "mixed_precision": ("no", "bf16"),
}


@dataclass(frozen=True)
class TrainOptions:
    """Options of ``train_bundle`` and ``finetune_weights``. ``TrainOptions.paper()`` are those of the paper's Algorithm 1.

    Attributes:
        objective: "kl" to the full-cache model, or the paper's "ce" (cross-entropy of the text).
        l1_weight: lambda, the weight of the summed mean absolute errors of keys and values (and of reuses).
        layer_steps: optimiser steps for each layer alone: stage (a).
        joint_steps: optimiser steps for all layers together: stage (b).
        joint_trains: what stage (b) changes; the paper's is "encoders".
        start: "bundle" goes on from the bundle's codecs; "random" forgets them (autoencoders only).
        learning_rate: of Adam in stage (b); half a cosine down to 0 after a short rise.
        layer_learning_rate: the same in stage (a).
        windows_per_step: windows whose gradients make one step.
        accumulation: passes those windows are spread over, to save memory.
        validation_windows: last windows of the text, held out to keep the best state.
        validate_every: steps of stage (b) between validations; in stage (a) there is one at the end of each layer.
        patience: validations without progress that end stage (b); 0 never does.
        step_tokens: tokens that see each other exactly; 1 is a text stepped token by token.
        mixed_precision: "no", or "bf16" for the model's own products; codecs and losses stay in float32.
        seed: of the order of windows and of random codecs.
    """

    objective: Literal["kl", "ce"] = "kl"
    l1_weight: float = 0.0
    layer_steps: int = 0
    joint_steps: int = 100
    joint_trains: Literal["encoders", "decoders", "all"] = "all"
    start: Literal["bundle", "random"] = "bundle"
    learning_rate: float = 3e-4
    layer_learning_rate: float = 1e-3
    windows_per_step: int = 2
    accumulation: int = 1
    validation_windows: int = 2
    validate_every: int = 20
    patience: int = 0
    step_tokens: int = 1
    mixed_precision: Literal["no", "bf16"] = "no"
    seed: int = 0

    @classmethod
    def paper(cls, **changes: Any) -> TrainOptions:
        """Make the options of Algorithm 1 of KV-CAR (arXiv 2512.06727), as far as the paper fixes it."""
        given: dict[str, Any] = {
            "objective": "ce", "l1_weight": 0.1, "layer_steps": 50, "joint_steps": 100, "joint_trains": "encoders",
            "start": "random",
        }  # fmt: skip
        return cls(**(given | changes))

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name in ("layer_steps", "joint_steps", "patience"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("windows_per_step", "accumulation", "validation_windows", "validate_every", "step_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.windows_per_step % self.accumulation:
            raise InputError(
                f"windows_per_step ({self.windows_per_step}) must be a multiple of accumulation ({self.accumulation})"
            )
        if self.learning_rate <= 0 or self.layer_learning_rate <= 0 or self.l1_weight < 0:
            raise InputError("learning rates must be above 0, and l1_weight must not be negative")


@dataclass(frozen=True)
class TrainResult:
    """A trained bundle and how training went.

    Attributes:
        bundle: the same plan, with trained codecs or for tuned weights.
        history: an entry for each step (``loss``) and each validation (``validation_loss``), by ``stage`` and ``step``.
    """

    bundle: Bundle
    history: list[dict[str, Any]]


def check_training(model: PreTrainedModel, bundle: Bundle, windows: Tensor, options: TrainOptions) -> None:
    """Raise InputError if nothing would be left to train on, ModelMismatchError for another model's bundle."""
    bundle.check_model(model)
    if windows.ndim != 2 or len(windows) <= options.validation_windows:
        raise InputError(
            f"training needs more windows than the {options.validation_windows} held out, got {len(windows)}; "
            "give more text, or a shorter context"
        )


def provenance_with(
    bundle: Bundle, source: TextSource, windows: Tensor, options: TrainOptions, **more: Any
) -> FitProvenance:
    """Add to a bundle's provenance what it was trained on and how."""
    trained: dict[str, Any] = {f"train_{name}": value for name, value in asdict(options).items()}
    trained |= {"train_text": source.name, "train_text_sha256": source.sha256, "train_tokens": windows.numel()}
    trained |= {"train_context": windows.shape[1], **more}
    return bundle.fit.model_copy(update={"options": {**bundle.fit.options, **trained}})
