"""The paper's Algorithm 1: each layer's codecs alone (a), then all together (b).

Source: KV-CAR (arXiv 2512.06727). Stage (a) runs only the layers from the one in training on: what reaches it does not
change, so it is computed once and carried upwards layer by layer. Gradients flow no further down than its codecs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..bundle import Bundle, CodedBlock, FitProvenance
from ..text import TextSource
from ..progress import OnProgress, silent
from .options import TrainOptions
from .run import OnStep, Run, check_windows, told_nobody
from .trainer import Stage
from .units import Unit, random_units, units_of


@dataclass(frozen=True)
class TrainResult:
    """A trained bundle and how training went.

    Attributes:
        bundle: the same plan with trained codecs.
        history: an entry for each step (``loss``) and each validation (``validation_loss``), by ``stage`` and ``step``.
    """

    bundle: Bundle
    history: list[dict[str, Any]]


def train_bundle(
    model: PreTrainedModel,
    bundle: Bundle,
    windows: Tensor,
    source: TextSource,
    options: TrainOptions | None = None,
    checkpoint: Path | None = None,
    resume: bool = False,
    on_progress: OnProgress = silent,
    on_step: OnStep = told_nobody,
) -> TrainResult:
    """Train a bundle's codecs inside the model; its weights do not change.

    Args:
        model: the model that the bundle was fitted for, with sdpa attention.
        bundle: what to start from; blocks lie within a layer.
        windows: token ids int64 ``[N, context]``; the last ones are held back for validation.
        source: where they come from, for provenance.
        options: see ``TrainOptions``.
        checkpoint: folder to keep the state in, so that a killed run can go on.
        resume: go on from what ``checkpoint`` holds.
        on_progress, on_step: told what is going on.

    Raises:
        InputError: options, text or a checkpoint that do not fit.
        ModelMismatchError: the bundle belongs to another model.
        FitError: training diverged.
    """
    options = options or TrainOptions()
    bundle.check_model(model)
    check_windows(windows, options)
    run = _CodecRun(model, bundle, windows, options, on_progress, on_step)
    run.go(run.stages(), checkpoint, resume)
    return TrainResult(_with_units(bundle, run.units, source, windows, options), run.state.history)


class _CodecRun(Run):
    """Trains the units of a plan's blocks."""

    def __init__(
        self,
        model: PreTrainedModel,
        bundle: Bundle,
        windows: Tensor,
        options: TrainOptions,
        on_progress: OnProgress,
        on_step: OnStep,
    ) -> None:
        device = next(model.parameters()).device
        if options.start == "bundle":
            self.units = units_of(bundle, device)
        else:
            train = windows[: -options.validation_windows]
            self.units = random_units(model, bundle.plan, train, options.seed, device)
        super().__init__(model, bundle, windows, options, self.units, self.units, on_progress, on_step)
        self._layer_units: dict[int, list[Unit]] = {}
        for index, unit in self.units.items():
            assert isinstance(unit, Unit)
            self._layer_units.setdefault(bundle.plan.blocks[int(index)].slots[0].layer, []).append(unit)
        # By window, held-back ones last: (layer, what reaches it).
        self._prefix: dict[int, tuple[int, Tensor]] = {}

    def stages(self):
        """Stage (a) for each layer from below, then stage (b)."""
        layers = sorted(self._layer_units) if self.options.layer_steps else []
        return [*(partial(self._layer_stage, layer) for layer in layers), self._joint_stage]

    def _layer_stage(self, layer: int) -> Stage:
        def logits(places: Sequence[int], ids: Tensor) -> Tensor:
            pairs = zip(places, ids, strict=True)
            reaching = torch.cat([self._reaching(layer, place, window) for place, window in pairs])
            return self.from_layer(layer, reaching, ids)

        def loss(windows: Sequence[int]) -> float:
            return self.accumulate(windows, lambda some: logits(some, self.train[list(some)]))

        def validate() -> float:
            first = len(self.train)
            return self.validation([logits([first + place], ids[None]) for place, ids in enumerate(self.held)])

        parameters = [p for unit in self._layer_units[layer] for p in unit.parameters()]
        steps, rate = self.options.layer_steps, self.options.layer_learning_rate
        return Stage(f"layer {layer}", steps, rate, parameters, loss, validate, max(1, steps))

    def _joint_stage(self) -> Stage:
        def loss(windows: Sequence[int]) -> float:
            return self.accumulate(windows, lambda some: self.compressed(self.train[list(some)]))

        def validate() -> float:
            return self.validation([self.compressed(w[None]) for w in self.held])

        parameters: list[nn.Parameter] = []
        for unit in self.units.values():
            assert isinstance(unit, Unit)
            if self.options.joint_trains in ("encoders", "all"):
                parameters += unit.codec.encoder_parameters()
            if self.options.joint_trains in ("decoders", "all"):
                parameters += unit.codec.decoder_parameters()
        o = self.options
        return Stage(
            "all layers",
            o.joint_steps,
            o.learning_rate,
            parameters,
            loss,
            validate,
            o.validate_every,
            o.patience,
            order=1,
        )

    def _reaching(self, layer: int, place: int, ids: Tensor) -> Tensor:
        """What reaches ``layer`` in one window, carried on from the layer where it was last asked for.

        All layers see the same windows, so each window passes each layer once in the whole of stage (a).
        """
        if layer == 0:
            return ids.new_empty(1, 0)  # not read: nothing is skipped below the first layer
        if self._prefix.get(place, (0, None))[0] != layer:
            with self.precision(), self.simulator.compressing(()):
                self._prefix[place] = (layer, self.stack.hidden(ids[None], layer, self._prefix.get(place)))
        return self._prefix[place][1]


def _with_units(
    bundle: Bundle, units: nn.ModuleDict, source: TextSource, windows: Tensor, options: TrainOptions
) -> Bundle:
    blocks = list(bundle.blocks)
    for index, unit in units.items():
        assert isinstance(unit, Unit)
        blocks[int(index)] = CodedBlock(unit.cpu().codec.freeze(), blocks[int(index)].quantizer)
    return replace(bundle, blocks=tuple(blocks), fit=provenance_with(bundle, source, windows, options, {}))


def provenance_with(
    bundle: Bundle, source: TextSource, windows: Tensor, options: TrainOptions, more: dict[str, Any]
) -> FitProvenance:
    """The bundle's provenance with what it was trained on and how."""
    told: dict[str, Any] = {f"train_{name}": value for name, value in options.as_dict().items()}
    told |= {"train_text": source.name, "train_text_sha256": source.sha256, "train_tokens": windows.numel()}
    told |= {"train_context": windows.shape[1], **more}
    return bundle.fit.model_copy(update={"options": {**bundle.fit.options, **told}})
