"""Tuning a finished bundle's codecs on KL divergence to the full-cache model, blocks of any shape.

Two passes a window, as in a prefill: clean keys and values are coded, a second pass attends over what comes back, and its
divergence is what Adam descends. Decoders are tuned as maps between whitened latents and normalised elements, so that one
learning rate fits all. The start counts as a candidate: by held-back windows the result is never worse than what was given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..bundle import Bundle, CodedBlock
from ..codecs import LinearCodec, Quantizer
from ..errors import InputError
from ..models.frozen import frozen
from ..plan import Plan, step_tokens
from ..progress import OnProgress, silent
from .checkpoint import TrainState
from .losses import kl_divergence
from .run import OnStep, told_nobody
from .trainer import Stage, mean, run_stage, window_order
from .two_pass import Prefilled, TwoPass
from .units import straight_through


@dataclass(frozen=True)
class DistillOptions:
    """Options of ``distill``.

    Attributes:
        steps: optimiser steps, one window each.
        learning_rate: of Adam at its highest, in units of normalised decoders.
        trains: "decoders", or "all" for encoders too, through a quantiser that gradients pass straight.
        held_windows: last windows of the text, held back to choose the best state.
        validate_every: steps between validations.
        patience: validations without progress that end it; 0 never does.
        seed: of the order of windows.
        window: recent tokens read exactly; None takes the plan's.
    """

    steps: int = 20
    learning_rate: float = 1e-4
    trains: str = "decoders"
    held_windows: int = 2
    validate_every: int = 10
    patience: int = 2
    seed: int = 0
    window: int | None = None

    def __post_init__(self) -> None:
        if self.trains not in ("decoders", "all"):
            raise InputError(f"trains must be decoders or all, got {self.trains!r}")
        if self.steps < 1 or self.held_windows < 1 or self.validate_every < 1:
            raise InputError("steps, held_windows and validate_every must be at least 1")


class TunedLinear(nn.Module):
    """A linear codec in tuning: ``x ~ mean + bias + std * ((z / spread) @ weight)``.

    Args:
        codec: where it starts.
        quantizer: rounds latents as the cache does.
        std: standard deviation of the block's elements, ``[W]``.
        spread: root mean square of each rounded latent, ``[R]``.
        trains: see ``DistillOptions``.
    """

    def __init__(self, codec: LinearCodec, quantizer: Quantizer, std: Tensor, spread: Tensor, trains: str) -> None:
        super().__init__()
        self._start, self._quantizer = codec, quantizer
        self.std, self.spread = nn.Buffer(std), nn.Buffer(spread)
        self.weight = nn.Parameter(spread[:, None] * codec.decoder / std)
        self.bias = nn.Parameter(torch.zeros_like(std))
        whitened = codec.encoder * std[:, None] / spread
        self.encoder = nn.Parameter(whitened, requires_grad=trains == "all")

    def forward(self, x: Tensor) -> Tensor:
        """What the cache gives back for vectors ``[N, W]``."""
        if self.encoder.requires_grad:
            z = ((x - self._start.centre) / self.std) @ self.encoder * self.spread
        else:
            z = self._start.encode(x)
        z = straight_through(self._quantizer, z)
        return ((z / self.spread) @ self.weight + self.bias) * self.std + self._start.mean

    @torch.no_grad()
    def freeze(self) -> LinearCodec:
        """The codec as it stands."""
        decoder = (self.weight / self.spread[:, None] * self.std).contiguous()
        mean = self._start.mean + self.bias * self.std
        encoder = self._start.encoder
        if self.encoder.requires_grad:
            encoder = (self.encoder / self.std[:, None] * self.spread).contiguous()
        # The encoder goes on subtracting what it was given; the bundle keeps the two apart.
        return LinearCodec(mean.detach(), encoder.detach(), decoder.detach(), centre=self._start.centre)


@dataclass(frozen=True)
class Distilled:
    """A tuned bundle, its held-back divergences before and after, and the entries of every step."""

    bundle: Bundle
    before: float
    after: float
    history: list[dict[str, Any]]


def distill(
    model: PreTrainedModel,
    bundle: Bundle,
    windows: Tensor,
    options: DistillOptions | None = None,
    on_progress: OnProgress = silent,
    on_step: OnStep = told_nobody,
) -> Distilled:
    """Tune a bundle's codecs; its plan, bits and steps stay as they are.

    Args:
        model: the model that the bundle was fitted for, with sdpa attention.
        bundle: of linear codecs with static quantisers.
        windows: token ids int64 ``[N, context]``; the last ones are held back.
        options: see ``DistillOptions``.
        on_progress, on_step: told what is going on.

    Raises:
        InputError: too few windows, or codecs of another kind.
        ModelMismatchError: the bundle belongs to another model.
        FitError: training diverged.
    """
    options = options or DistillOptions()
    bundle.check_model(model)
    if windows.ndim != 2 or len(windows) <= options.held_windows:
        raise InputError(f"tuning needs more than {options.held_windows} windows, got {len(windows)}; give more text")
    run = _Distillation(model, bundle, windows, options)
    state = TrainState()

    def tell(entry: dict[str, Any]) -> None:
        state.history.append(entry)
        on_step(entry)
        on_progress("tune codecs", state.step, options.steps)

    with frozen(model), run.passes:
        units = run.units()
        trained = [p for p in units.parameters() if p.requires_grad]
        stage = Stage(
            "codecs", options.steps, options.learning_rate, trained, run.loss, run.validate, options.validate_every,
            options.patience,
        )  # fmt: skip
        run_stage(stage, units, state, torch.optim.Adam(trained), run.windows_of, lambda: None, tell)
    held = [entry["validation_loss"] for entry in state.history if "validation_loss" in entry]
    # Where nothing was better than the start, the start itself comes back, not its rounded image.
    result = run.result() if min(held) < held[0] else bundle
    return Distilled(result, held[0], min(held), state.history)


class _Distillation:
    """What the stage asks for: passes over windows through the units under way."""

    def __init__(self, model: PreTrainedModel, bundle: Bundle, windows: Tensor, options: DistillOptions) -> None:
        plan: Plan = bundle.plan
        window = plan.window if options.window is None else options.window
        self.passes = TwoPass(model, plan, step_tokens(plan.page_tokens, plan.window), window)
        self._bundle, self._options, self._device = bundle, options, next(model.parameters()).device
        self._train, self._held = windows[: -options.held_windows], windows[-options.held_windows :]
        self._units = nn.ModuleDict()

    def units(self) -> nn.ModuleDict:
        """Units that start as the bundle's codecs, scaled by what they see in one window."""
        prefilled = self.passes.prefill(self._train[0])
        units: dict[str, nn.Module] = {}
        for index, coded in enumerate(self._bundle.blocks):
            if coded.codec is None:
                continue
            if not isinstance(coded.codec, LinearCodec) or coded.quantizer is None:
                raise InputError(f"only linear codecs are tuned here, and block {index} has {coded.codec.name}")
            plan = self._bundle.plan
            moved = coded.on(self._device, plan.blocks[index], plan.geometry.head_dim)
            codec, quantizer = moved.codec, moved.quantizer
            assert isinstance(codec, LinearCodec)
            assert quantizer is not None
            x = self.passes.block_vectors(prefilled, index)[self._bundle.plan.sinks :]
            rounded = quantizer.latents(quantizer.codes(codec.encode(x)))
            std = x.std(0).clamp_min(1e-6)
            spread = rounded.square().mean(0).sqrt().clamp_min(1e-6)
            units[str(index)] = TunedLinear(codec, quantizer, std, spread, self._options.trains)
        self._units = nn.ModuleDict(units)
        return self._units

    def windows_of(self, step: int) -> Sequence[int]:
        return window_order(len(self._train), self._options.seed, 0, step, 1)

    def loss(self, places: Sequence[int]) -> float:
        total = 0.0
        for place in places:
            prefilled = self.passes.prefill(self._train[place])
            loss = self._divergence(prefilled)
            (loss / len(places)).backward()
            total += loss.item() / len(places)
        return total

    def validate(self) -> float:
        return mean([self._divergence(self.passes.prefill(window)) for window in self._held])

    def _divergence(self, prefilled: Prefilled) -> Tensor:
        codes = {int(index): unit for index, unit in self._units.items()}
        return kl_divergence(self.passes.read(prefilled, codes), prefilled.logits)

    def result(self) -> Bundle:
        blocks = list(self._bundle.blocks)
        for index, unit in self._units.items():
            assert isinstance(unit, TunedLinear)
            blocks[int(index)] = CodedBlock(unit.cpu().freeze(), blocks[int(index)].quantizer)
        return replace(self._bundle, blocks=tuple(blocks))
