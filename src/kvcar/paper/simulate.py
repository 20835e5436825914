"""Running a model as if its cache were compressed: one pass over all tokens, differentiable.

Every layer's keys and values are coded and decoded as the layer computes them, so that errors compound through the
layers as they do when a text is stepped through the cache with window 0. ``Simulator`` does that, with a ``Unit`` for
each block; ``LayerStack`` runs only the layers from one on.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..bundle import Bundle
from ..codecs import Quantizer, TrainableCodec, read_quantizer
from ..codecs.autoencoder import AutoencoderModule
from ..errors import InputError, UnsupportedModelError
from ..fit.attention import compressed_attention, read_exactly
from ..fit.statistics import bands_of, collect_statistics
from ..geometry import KINDS, Slot
from ..models.attention_hook import AttentionHook
from ..models.structure import find_decoder
from ..plan import RAW_BITS, Plan

Units = Mapping[str, Any] | nn.ModuleDict


class Simulator(AttentionHook):
    """Stands in for a compressed cache while codecs are trained or reuses are tried out; a context manager.

    Args:
        model: a causal language model using sdpa attention; restored at the end.
        plan: how slots are stored; blocks lie within a layer.
        units: the module that gives a block's reconstruction, by the block's index as a string.
        step_tokens: tokens of a step, which see each other exactly.

    Raises:
        InputError: a block spans layers, whose later layers do not exist yet when the first is read.
    """

    def __init__(self, model: PreTrainedModel, plan: Plan, units: Units, step_tokens: int = 1) -> None:
        for block in plan.blocks:
            if len({slot.layer for slot in block.slots}) > 1:
                raise InputError("training in one pass needs blocks within a layer; fit with --layers-per-block 1")
        super().__init__(model, plan.geometry)
        self.plan, self._units, self._step_tokens = plan, units, step_tokens
        self._active: frozenset[int] = frozenset(plan.coded_layers)
        self._blocks: dict[int, list[int]] = {}
        for index, block in enumerate(plan.blocks):
            self._blocks.setdefault(block.slots[0].layer, []).append(index)
        self._sources = {source for slot, source in plan.stored_source.items() if slot != source}
        self._stored: dict[Slot, Tensor] = {}
        self.distances: list[Tensor] = []

    @contextmanager
    def compressing(self, layers: Collection[int] | None = None) -> Iterator[None]:
        """Compress just ``layers`` (None: all that the plan codes) in the passes inside; ``()`` is the full cache."""
        before = self._active
        self._active = frozenset(self.plan.coded_layers if layers is None else layers)
        self._stored, self.distances = {}, []
        try:
            yield
        finally:
            self._active = before

    def logits(self, ids: Tensor) -> Tensor:
        """Logits ``[B, T, V]`` of windows int64 ``[B, T]``; afterwards ``distances`` holds each block's and each
        reuse's mean absolute error.
        """
        self._stored, self.distances = {}, []
        return self.model(input_ids=ids, use_cache=False).logits

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        softcap: float | None,
        sinks: Tensor | None = None,
    ) -> Tensor | None:
        """See ``AttentionHook``."""
        if layer not in self._active:
            return None
        before_rope = self.before_rope(layer, key)
        sides = zip(KINDS, (before_rope, value), strict=True)
        slots = {
            Slot(layer, head, kind): side[:, head].float() for kind, side in sides for head in range(side.shape[1])
        }
        decoded = self._decode(layer, slots)
        keys = torch.stack([decoded[Slot(layer, head, "key")] for head in range(key.shape[1])], dim=1)
        values = torch.stack([decoded[Slot(layer, head, "value")] for head in range(key.shape[1])], dim=1)
        keys = self.after_rope(layer, keys)
        exact = self.plan.sinks
        keys = torch.cat([key[:, :, :exact].float(), keys[:, :, exact:]], dim=2)
        values = torch.cat([value[:, :, :exact].float(), values[:, :, exact:]], dim=2)
        exactly = read_exactly(key.shape[2], self._step_tokens, key.device)
        hidden = self.hidden(layer, key.shape[2], key.device)
        return compressed_attention(query, (key, value), (keys, values), exactly, scaling, softcap, sinks, hidden)

    def _decode(self, layer: int, slots: dict[Slot, Tensor]) -> dict[Slot, Tensor]:
        """What the cache gives back for every slot of a layer."""
        sinks, decoded = self.plan.sinks, dict(slots)
        # Products in float32 also under autocast: the cache encodes and decodes in float32.
        with torch.autocast(next(iter(slots.values())).device.type, enabled=False):
            for index in self._blocks.get(layer, ()):
                own = self.plan.blocks[index].slots
                if str(index) not in self._units:
                    continue  # lossless
                x = torch.cat([slots[slot] for slot in own], dim=-1)
                y = self._units[str(index)](x)
                self.distances.append((x - y)[:, sinks:].abs().mean())
                decoded.update(zip(own, y.split(self.plan.geometry.head_dim, dim=-1), strict=True))
        for slot in slots:
            source = self.plan.stored_source[slot]
            if source != slot and source.layer in self._active:
                decoded[slot] = self._stored[source]
                self.distances.append((slots[slot] - decoded[slot])[:, sinks:].abs().mean())
        self._stored |= {slot: decoded[slot] for slot in slots if slot in self._sources}
        return decoded


# What codes a block while it is trained


class Unit(nn.Module):
    """Encodes, rounds as the cache does, and decodes the vectors of one block.

    Args:
        codec: what is trained.
        quantizer: what rounds its latents; its steps stay as they are.
    """

    def __init__(self, codec: TrainableCodec, quantizer: Quantizer) -> None:
        super().__init__()
        self.codec, self.quantizer = codec, quantizer

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction ``[..., W]`` of ``x`` ``[..., W]``, both float32."""
        flat = x.flatten(0, -2)
        z = self.codec.encode(flat)
        return self.codec.decode(straight_through(self.quantizer, z)).view_as(x)


def straight_through(quantizer: Quantizer, z: Tensor) -> Tensor:
    """Latents as the cache gives them back; the rounding's gradient counts as 1 (Bengio et al. 2013, arXiv 1308.3432)."""
    return z + (quantizer.latents(quantizer.codes(z.detach())) - z.detach())


def units_of(bundle: Bundle, device: torch.device) -> nn.ModuleDict:
    """A unit for every block that is not lossless, by the block's index as a string.

    Raises:
        InputError: a codec has nothing to train.
    """
    units: dict[str, nn.Module] = {}
    for index, (block, coded) in enumerate(zip(bundle.plan.blocks, bundle.blocks, strict=True)):
        if coded.codec is not None and coded.quantizer is not None:
            steps = {name: t.to(device) for name, t in coded.quantizer.tensors().items()}
            units[str(index)] = Unit(coded.codec.trainable(), read_quantizer(steps, block, bundle.plan.page_tokens))
    if not units:
        raise InputError("this bundle has no block that can be trained; fit a linear or autoencoder bundle first")
    return nn.ModuleDict(units).to(device)


def random_units(model: PreTrainedModel, plan: Plan, windows: Tensor, seed: int, device: torch.device) -> nn.ModuleDict:
    """The paper's autoencoders as they are before any training, BatchNorm and all; inputs normalised by a pass over text.

    Raises:
        InputError: the plan has other codecs, or static steps, which need latents that are already known.
    """
    for block in plan.blocks:
        if block.codec != "autoencoder" or (block.groups[0].bits != RAW_BITS and block.scales == "static"):
            raise InputError(
                "a random start needs autoencoder blocks of 16-bit latents or dynamic scales; "
                f"got {block.codec} with {block.groups[0].bits if block.groups else 16} bits"
            )
    bands = bands_of(plan.geometry, [block.slots for block in plan.blocks])
    statistics = collect_statistics(model, plan.geometry, windows, bands, plan.sinks, windows.numel())
    torch.manual_seed(seed)
    units: dict[str, nn.Module] = {}
    for index, block in enumerate(plan.blocks):
        mean, std = statistics.mean(block.slots), statistics.variance(block.slots).clamp_min(1e-12).sqrt()
        module = AutoencoderModule(mean.float(), std.float(), 2 * block.latents, block.latents)
        units[str(index)] = Unit(module, read_quantizer(_unit_steps(block.latents, device), block, plan.page_tokens))
    return nn.ModuleDict(units).to(device)


def _unit_steps(latents: int, device: torch.device) -> dict[str, Tensor]:
    """Tensors of a quantiser that leaves 16-bit latents as they are."""
    return {
        "scale": torch.ones(latents, device=device, dtype=torch.float32),
        "zero": torch.zeros(latents, device=device, dtype=torch.float32),
    }


# Running part of a decoder


class LayerStack:
    """The decoder layers of a model, in order.

    Raises:
        UnsupportedModelError: attention modules do not lie in a list of layers.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        names = {id(module): name for name, module in model.named_modules()}
        self.layers = tuple(
            _enclosing_layer(model, names[id(m)], i) for i, m in sorted(find_decoder(model).attention.items())
        )
        self._in_tuple = False

    def __len__(self) -> int:
        return len(self.layers)

    @torch.no_grad()
    def hidden(self, ids: Tensor, layer: int, start: tuple[int, Tensor] | None = None) -> Tensor:
        """What reaches ``layer``, ``[B, T, hidden]``; ``len(self)`` is what leaves the last one.

        Args:
            ids: windows int64 ``[B, T]``.
            layer: layer whose input is wanted.
            start: (a layer up to ``layer``, what reaches it), so that layers below need not run.
        """
        if start is not None and start[0] == layer:
            return start[1]
        reached: list[Tensor] = []

        def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            del module, args
            self._in_tuple = isinstance(output, tuple)
            reached.append(output[0] if self._in_tuple else output)
            raise _Reached

        if layer == 0:
            raise ValueError("nothing runs before the first layer")
        handle = self.layers[layer - 1].register_forward_hook(note)
        try:
            with self.starting_at(*(start or (0, None))):
                self._model(input_ids=ids, use_cache=False)
        except _Reached:
            return reached[0]
        finally:
            handle.remove()
        raise UnsupportedModelError(f"{type(self._model).__name__} does not run its decoder layers one after another")

    @contextmanager
    def starting_at(self, layer: int, hidden: Tensor | None) -> Iterator[None]:
        """Passes inside skip the layers below ``layer`` and feed it ``hidden`` (not needed for layer 0)."""

        def skip(incoming: Tensor, *args: Any, **kwargs: Any) -> Any:
            del incoming, args, kwargs
            return (hidden,) if self._in_tuple else hidden

        skipped = self.layers[:layer]
        for module in skipped:
            module.__dict__["forward"] = skip
        try:
            yield
        finally:
            for module in skipped:
                del module.__dict__["forward"]


class _Reached(Exception):
    """The layer that was asked for has run."""


def _enclosing_layer(model: nn.Module, name: str, index: int) -> nn.Module:
    """The entry of a module list that an attention module lies in: ``model.layers.3`` of ``model.layers.3.self_attn``."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        if parts[end - 1] == str(index) and isinstance(model.get_submodule(".".join(parts[: end - 1])), nn.ModuleList):
            return model.get_submodule(".".join(parts[:end]))
    raise UnsupportedModelError(f"{type(model).__name__} keeps attention module {name} outside a list of layers")
