# pyright: reportMissingImports=false
"""The layer that is not there: vLLM gives it pages as to a layer of full attention, and they hold the codes of all layers."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.kv_cache_interface import FullAttentionSpec

from ...cache.coder import PageCoder
from ...errors import UnsupportedModelError
from ...geometry import Slot
from ...kernels.rotary import RotaryTable
from .sizes import BlockSizes
from .step import Step

_log = logging.getLogger("vllm.kvcar")
CODES_LAYER = "kvcar.codes.0"
_ENCODED_AT_ONCE = 8


@dataclass(frozen=True)
class RealLayer:
    """One attention layer of the model.

    Attributes:
        name: by which vLLM knows it.
        index: by which the plan knows it.
        module: vLLM's layer, whose ``kv_cache`` holds exact keys and values ``[blocks, H, tokens, 2 D]``.
        rotary: how its keys are rotated; None where they are not.
    """

    name: str
    index: int
    module: Any
    rotary: RotaryTable | None

    def exact(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``[..., H, D]`` of vLLM's slots int64 ``[...]``."""
        cache = self.module.kv_cache
        rows = cache[slots // cache.shape[2], :, slots % cache.shape[2]]
        keys, values = rows.chunk(2, dim=-1)
        return keys, values


@dataclass(eq=False)
class Codes(AttentionLayerBase):
    """Pages of codes, and what is needed to write and read them.

    Attributes:
        coder: of the bundle.
        sizes: of the blocks.
        layers: of the model, by name, in the order in which they run.
        dtype: of the model.
        backend: of vLLM's metadata for this layer.
    """

    coder: PageCoder
    sizes: BlockSizes
    layers: dict[str, RealLayer]
    dtype: torch.dtype
    backend: Any
    kv_cache: Tensor = field(default_factory=lambda: torch.tensor([]))
    pages: Tensor = field(default_factory=lambda: torch.tensor([]))
    _step: Step | None = None

    def get_attn_backend(self) -> Any:
        """Give the backend, as vLLM asks for it."""
        return self.backend

    def get_kv_cache_spec(self, vllm_config: Any) -> FullAttentionSpec:
        """Say what vLLM is to keep for this layer: a page of codes for every ``page_tokens`` tokens."""
        del vllm_config
        # In the model's dtype: vLLM takes bytes for a quantised cache and writes zeros to every new block.
        return FullAttentionSpec(
            block_size=self.sizes.shape.page_tokens, num_kv_heads=1, num_head_slots=1, dtype=self.dtype,
            head_size=self.sizes.code_bytes, state_content_bytes=self.sizes.code_bytes,
        )  # fmt: skip

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        """Take the memory ``[blocks, 1, page_tokens, C]`` that vLLM gives."""
        self.kv_cache = kv_cache
        raw = kv_cache.view(torch.uint8)
        blocks, _, tokens, content = raw.shape
        size = self.sizes.shape.page_bytes
        # Pages as one run of bytes each, one behind the other by vLLM's stride.
        if raw.stride()[2:] != (content, 1) or tokens * content < size:
            raise UnsupportedModelError(
                f"vLLM lays pages of codes out with shape {tuple(raw.shape)} and strides {raw.stride()}, expected {size} bytes in a row; "
                "leave VLLM_KV_CACHE_LAYOUT alone"
            )
        stock = blocks * self.sizes.block_bytes // (self.sizes.shape.exact_bytes or 1)
        _log.info(
            "kvcar: %d blocks for pages of %d tokens, %d tokens in the place of %d, and for windows",
            blocks, tokens, blocks * tokens, stock,
        )  # fmt: skip
        self.pages = raw.as_strided((1, blocks, tokens * content), (0, raw.stride(0), 1))[..., :size]

    @property
    def last(self) -> str:
        """Name of the layer that runs last."""
        return next(reversed(self.layers))

    def step(self, metadata: Mapping[str, Any]) -> Step:
        """What the pass under way computes; made when its first layer asks."""
        own = metadata[CODES_LAYER]
        if self._step is None or self._step.rows is not own:
            groups = {name: metadata[name] for name in self.layers}
            self._step = Step(own, groups, self.sizes.shape)
        return self._step

    def encode(self, step: Step) -> None:
        """Write the pages that are full by the end of this pass, of all layers' exact keys and values."""
        full = step.full_pages
        for first in range(0, len(full.blocks), _ENCODED_AT_ONCE):
            some = slice(first, first + _ENCODED_AT_ONCE)
            fetch = self._fetcher(step, full.requests[some], full.positions[some])
            there = full.positions[some] >= self.sizes.shape.sinks  # sinks are not read from codes
            for unit in self.coder.units:
                segment, means = unit.unit.segment, unit.unit.means
                coded = unit.whole_pages(unit.vectors(fetch), there)
                self.pages[0, full.blocks[some], segment.offset : segment.end] = coded.data[:, 0]
                if means is not None and coded.means is not None:
                    self.pages[0, full.blocks[some], means.offset : means.end] = coded.means[:, 0]

    def _fetcher(self, step: Step, requests: Tensor, positions: Tensor) -> Any:
        """Access to vectors ``[pages, page_tokens, D]`` of tokens of the pages; keys before or after RoPE."""
        memo: dict[tuple[int, str, bool], Tensor] = {}
        by_index = {layer.index: layer for layer in self.layers.values()}

        def fetch(slot: Slot, before_rope: bool) -> Tensor:
            key = (slot.layer, slot.kind, before_rope)
            if key not in memo:
                layer = by_index[slot.layer]
                keys, values = layer.exact(step.slots(layer.name, requests[:, None], positions))
                side = (keys if slot.kind == "key" else values).transpose(1, 2)
                if slot.kind == "key" and before_rope and layer.rotary is not None:
                    side = layer.rotary.unrotate(side, positions)
                memo[key] = side
            return memo[key][:, slot.head]

        return fetch


def in_order(layers: Sequence[RealLayer]) -> dict[str, RealLayer]:
    """Layers by name in the order in which a decoder runs them."""
    return {layer.name: layer for layer in sorted(layers, key=lambda layer: layer.index)}
