"""One streaming pass over text that hands out keys (before RoPE) and values, block by block.

The model runs as it is, over a cache that only looks; at most one window's vectors of the blocks that are not yet
complete exist at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from ..errors import FitError
from ..kernels.rotary import RotaryTable
from ..models.rotary_probe import RotaryProbe
from ..models.structure import find_decoder
from ..geometry import KVGeometry, Slot

OnBlock = Callable[[int, Tensor], None]
"""(block index, vectors float32 ``[tokens, W]``) -> None, called once per block and window."""


@torch.no_grad()
def capture(
    model: PreTrainedModel,
    geometry: KVGeometry,
    windows: Tensor,
    blocks: Sequence[Sequence[Slot]],
    sinks: int,
    on_block: OnBlock,
) -> Iterator[int]:
    """Run over ``windows`` int64 ``[N, tokens]`` one by one, yielding after each how many tokens were captured.

    The first ``sinks`` tokens of each window are left out: their outliers would spoil every statistic.

    Raises:
        FitError: keys or values are NaN or infinite.
    """
    parts = find_decoder(model, geometry.layers)
    probe = RotaryProbe(parts.decoder)
    tables: dict[int, RotaryTable] = {}

    def note_rotary(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del args
        layer = int(module.layer_idx)  # pyright: ignore[reportArgumentType]
        if geometry.rotary and layer in geometry.codable_layers and layer not in tables:
            tables[layer] = probe.table(kwargs.get("position_embeddings"))

    handles = list(probe.handles)
    handles += [m.register_forward_pre_hook(note_rotary, with_kwargs=True) for m in parts.attention]
    try:
        for window in windows:
            gather = _BlockGatherer(blocks, sinks, tables, on_block)
            ids = window[None].to(parts.device)
            parts.decoder(input_ids=ids, past_key_values=_watching_cache(geometry, gather), use_cache=True)
            probe.forget()
            yield len(window) - sinks
    finally:
        for handle in handles:
            handle.remove()


class _BlockGatherer:
    """Collects the layers of a window until a block is complete, hands it on, and lets go of what is done."""

    def __init__(
        self, blocks: Sequence[Sequence[Slot]], sinks: int, tables: dict[int, RotaryTable], on_block: OnBlock
    ) -> None:
        self._blocks, self._sinks, self._tables, self._on_block = blocks, sinks, tables, on_block
        self._last_layer = [max(slot.layer for slot in block) for block in blocks]
        self._sides: dict[tuple[int, str], Tensor] = {}

    def take(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Take keys after RoPE and values ``[1, H, T, D]`` of one layer."""
        if not (torch.isfinite(keys).all() and torch.isfinite(values).all()):
            raise FitError(f"layer {layer} computes NaN or infinity; check the model's weights and dtype")
        table = self._tables.get(layer)
        if table is not None:
            keys = table.unrotate(keys, torch.arange(keys.shape[2], device=keys.device)[None])
        self._sides[layer, "key"] = keys[0, :, self._sinks :].float()
        self._sides[layer, "value"] = values[0, :, self._sinks :].float()
        for index, block in enumerate(self._blocks):
            if self._last_layer[index] == layer:
                self._on_block(index, torch.cat([self._sides[s.layer, s.kind][s.head] for s in block], dim=-1))
        needed = {s.layer for b, last in zip(self._blocks, self._last_layer, strict=True) if last > layer for s in b}
        self._sides = {key: side for key, side in self._sides.items() if key[0] in needed}


class _WatchingLayer(DynamicLayer):
    """Shows what passes and keeps nothing."""

    def __init__(self, layer: int, gather: _BlockGatherer) -> None:
        super().__init__()
        self._layer, self._gather = layer, gather

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        del args, kwargs
        self._gather.take(self._layer, key_states, value_states)
        return key_states, value_states


def _watching_cache(geometry: KVGeometry, gather: _BlockGatherer) -> Cache:
    """A cache with a watching layer where the plan may code, and layers that keep nothing special elsewhere."""
    layers: list[Any] = [
        _WatchingLayer(layer, gather) if layer in geometry.codable_layers else DynamicLayer()
        for layer in range(geometry.layers)
    ]
    return Cache(layers=layers)
