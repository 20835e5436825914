"""The paper's Algorithm 1: each layer's codecs alone (a), then all together (b).

Source: KV-CAR (arXiv 2512.06727). Stage (a) runs only the layers from the one in training on: what reaches it does not
change, so it is computed once and carried upwards layer by layer. Gradients flow no further down than its codecs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..bundle import Bundle, CodedBlock
from ..progress import OnProgress, silent
from ..text import TextSource
from .options import OnStep, TrainOptions, TrainResult, check_training, ignore, provenance_with
from .simulate import Unit, random_units, units_of
from .trainer import Run, Stage


def train_bundle(
    model: PreTrainedModel,
    bundle: Bundle,
    windows: Tensor,
    source: TextSource,
    options: TrainOptions | None = None,
    checkpoint: Path | None = None,
    resume: bool = False,
    on_progress: OnProgress = silent,
    on_step: OnStep = ignore,
) -> TrainResult:
    """Train a bundle's codecs inside the model; its weights do not change.

    Args:
        model: the model that the bundle was fitted for, with sdpa attention.
        bundle: what to start from; blocks lie within a layer.
        windows: token ids int64 ``[N, context]``; the last ones are held out for validation.
        source: where they come from, for provenance.
        options: see ``TrainOptions``.
        checkpoint: folder to keep the state in, so that a killed run can go on.
        resume: go on from what ``checkpoint`` holds.
        on_progress, on_step: called as it goes.

    Raises:
        InputError: options, text or a checkpoint that do not fit.
        ModelMismatchError: the bundle belongs to another model.
        FitError: training diverged.
    """
    options = options or TrainOptions()
    check_training(model, bundle, windows, options)
    run = _CodecRun(model, bundle, windows, options, on_progress, on_step)
    run.go(run.stages(), checkpoint, resume)
    fit = provenance_with(bundle, source, windows, options)
    trained = replace(bundle, blocks=run.trained_blocks(bundle.blocks), fit=fit)
    return TrainResult(trained, run.state.history)


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
            units = units_of(bundle, device)
        else:
            units = random_units(model, bundle.plan, windows[: -options.validation_windows], options.seed, device)
        super().__init__(model, bundle, windows, options, units, units, on_progress, on_step)
        # By index of the block.
        self._units: dict[int, Unit] = {int(i): unit for i, unit in units.items() if isinstance(unit, Unit)}
        self._layer_units: dict[int, list[Unit]] = {}
        for index, unit in self._units.items():
            self._layer_units.setdefault(bundle.plan.blocks[index].slots[0].layer, []).append(unit)
        # By window, held-out ones last: (layer, what reaches it).
        self._prefix: dict[int, tuple[int, Tensor]] = {}

    def stages(self) -> list[Callable[[], Stage]]:
        """List stage (a) for each layer from below, then stage (b)."""
        layers = sorted(self._layer_units) if self.options.layer_steps else []
        return [*(partial(self._layer_stage, layer) for layer in layers), self._joint_stage]

    def trained_blocks(self, blocks: Sequence[CodedBlock]) -> tuple[CodedBlock, ...]:
        """Replace the codecs of a bundle's blocks by the trained ones."""
        coded = list(blocks)
        for index, unit in self._units.items():
            coded[index] = CodedBlock(unit.cpu().codec.freeze(), coded[index].quantizer)
        return tuple(coded)

    def _layer_stage(self, layer: int) -> Stage:
        def logits(places: Sequence[int], ids: Tensor) -> Tensor:
            pairs = zip(places, ids, strict=True)
            reaching = torch.cat([self._reaching(layer, place, window) for place, window in pairs])
            return self.from_layer(layer, reaching, ids)

        def loss(windows: Sequence[int]) -> float:
            return self.accumulate(windows, lambda some: logits(some, self.train[list(some)]))

        def validate() -> float:
            first = len(self.train)
            return self.validation([logits([first + place], ids[None]) for place, ids in enumerate(self.held_out)])

        parameters = [p for unit in self._layer_units[layer] for p in unit.parameters()]
        steps, rate = self.options.layer_steps, self.options.layer_learning_rate
        return Stage(f"layer {layer}", steps, rate, parameters, loss, validate, max(1, steps))

    def _joint_stage(self) -> Stage:
        parameters: list[nn.Parameter] = []
        for unit in self._units.values():
            if self.options.joint_trains in ("encoders", "all"):
                parameters += unit.codec.encoder_parameters()
            if self.options.joint_trains in ("decoders", "all"):
                parameters += unit.codec.decoder_parameters()
        return self.whole_stage("all layers", parameters, order=1)

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
