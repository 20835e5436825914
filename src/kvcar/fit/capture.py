"""One streaming pass over text that hands out keys (before RoPE) and values, block by block.

The model runs as it is, over a cache that only looks; at most one window's vectors of the blocks that are not yet
complete exist at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import FitError
from ..geometry import KVGeometry, Slot
from ..kernels.rotary import RotaryTable
from ..models.rotation import learn_rotations
from ..models.structure import cache_argument, find_decoder
from ..models.watching import WatchingCache

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
    parts = find_decoder(model)
    tables = learn_rotations(model, geometry)
    for window in windows:
        gather = _BlockGatherer(blocks, sinks, tables, on_block)
        ids = window[None].to(parts.device)
        cache = WatchingCache(model.config, geometry, gather.take, parts.device)
        parts.decoder(input_ids=ids, **cache_argument(parts.decoder, cache), use_cache=True)
        yield len(window) - sinks


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
