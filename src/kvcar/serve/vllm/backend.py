# pyright: reportMissingImports=false
"""vLLM's attention backend: exact keys and values into blocks of a sliding window, codes into pages, attention over both."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheLayout, SlidingWindowSpec, replace_as

from ...errors import UnsupportedModelError
from ...kernels.attend import ExactPast, PagedPast, attend
from .codes import CODES_LAYER, Codes
from .sizes import CacheShape
from .specs import SinkWindowSpec, WindowSpec
from .start import start
from .step import Part, Rows, Step

_NOT_A_WINDOW = ("sliding_window", "attention_chunk_size", "non_causal")


class KVCarBackend(AttentionBackend):
    """What vLLM asks of a backend. Layers get a subclass of it with the size of their blocks when the model is loaded."""

    forward_includes_kv_cache_update: bool = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto"]
    shape: ClassVar[CacheShape | None] = None
    window_tokens: ClassVar[int] = 0
    tokens_of_a_pass: ClassVar[int] = 0

    @staticmethod
    def get_name() -> str:
        """Name of the member of vLLM's list of backends that is ours to take."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[KVCarAttention]:
        """Give the class of layers' attention."""
        return KVCarAttention

    @staticmethod
    def get_builder_cls() -> type[RowsBuilder]:
        """Give the class that makes metadata."""
        return RowsBuilder

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """Models with windows of their own are refused with a better message than vLLM's."""
        return True

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[Any, ...]:
        """All layers of a block side by side, by which vLLM puts a page of codes and a window's block into one pool."""
        return (KVCacheLayout.BLHNC,)

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """Turn full attention into a sliding window of exact tokens."""
        shape = cls.shape
        if shape is None or not isinstance(spec, FullAttentionSpec):
            return spec
        # A query reads itself too. Without a window one token before it is kept as well: vLLM finds no hit of nothing.
        return replace_as(
            spec, SinkWindowSpec if shape.sinks else WindowSpec, drop=_NOT_A_WINDOW, block_size=cls.window_tokens,
            sliding_window=shape.kept + 1, page_tokens=shape.page_tokens, tokens_of_a_pass=cls.tokens_of_a_pass,
        )  # fmt: skip


class CodesBackend(KVCarBackend):
    """The backend of the layer of codes, whose spec stays as it is."""


class RowsBuilder(AttentionMetadataBuilder[Any]):
    """Makes the metadata of one group of layers."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._block_tokens = kv_cache_spec.block_size
        if CODES_LAYER not in layer_names and not isinstance(kv_cache_spec, SlidingWindowSpec):
            raise UnsupportedModelError(
                f"vLLM keeps all tokens of {layer_names[0]} exactly instead of a window of them, as it does without its hybrid "
                "KV cache manager; take --disable-hybrid-kv-cache-manager and KV connectors that switch it off away"
            )

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Rows:
        """Make the metadata of a pass."""
        del common_prefix_len, fast_build
        given = common_attn_metadata
        count = given.num_reqs
        return Rows(
            starts=given.query_start_loc_cpu[: count + 1].tolist(),
            lengths=given.seq_lens[:count].tolist(),
            block_table=given.block_table_tensor[:count],
            block_tokens=self._block_tokens,
            slot_mapping=given.slot_mapping,
            tokens=given.num_actual_tokens,
        )


class KVCarAttention(AttentionImpl[Any]):
    """Attention of one layer."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self._softcap = logits_soft_cap or None
        unknown = {
            "ALiBi": alibi_slopes is not None,
            "a sliding window of the model's own": sliding_window is not None,
            f"a cache of dtype {kv_cache_dtype} (leave --kv-cache-dtype auto)": kv_cache_dtype != "auto",
            f"attention of type {attn_type}": attn_type != AttentionType.DECODER,
            "layers that share keys and values": kv_sharing_target_layer_name is not None,
            "learned attention sinks": sinks is not None,
        }
        found = [name for name, there in unknown.items() if there]
        if found:
            raise UnsupportedModelError(f"kvcar in vLLM does not support {', '.join(found)}")

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Put the cache together when the first layer is ready; by then all layers exist, and no memory is given out yet."""
        del act_dtype
        config = get_current_vllm_config()
        if CODES_LAYER not in config.compilation_config.static_forward_context:
            start(config, KVCarBackend, CodesBackend)

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Keep keys after RoPE and values ``[tokens, H, D]`` exactly, in the blocks of the window."""
        del layer
        both = torch.cat([key, value], dim=-1)[: len(slot_mapping)]
        kept = slot_mapping[: len(both)]
        if bool((kept < 0).any()):
            both, kept = both[kept >= 0], kept[kept >= 0]
        kv_cache[kept // kv_cache.shape[2], :, kept % kv_cache.shape[2]] = both

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Write attention ``[tokens, Hq, D]`` into ``output``; the last layer also encodes the pages that are full now."""
        del key, value, kv_cache, output_scale, output_block_scale
        if attn_metadata is None:
            return output.zero_()  # vLLM measures how much memory a pass takes
        context = get_forward_context()
        codes: Codes = context.no_compile_layers[CODES_LAYER]
        step = codes.step(context.attn_metadata)
        for part in step.parts:
            _attend_part(self, codes, step, part, layer.layer_name, query, output)
        if layer.layer_name == codes.last:
            codes.encode(step)
        return output


def _attend_part(
    attention: KVCarAttention, codes: Codes, step: Step, part: Part, layer: str, query: Tensor, output: Tensor
) -> None:
    """Attention of some queries of a pass."""
    real = codes.layers[layer]
    keys, values = (side.transpose(1, 2) for side in real.exact(step.exact_slots(layer, part)))
    paged = _paged(codes, part, layer) if part.pages.shape[1] else None
    # [tokens, Hq, D] -> [B, Hq, count, D]
    own = query[part.tokens].unflatten(0, (len(part.requests), part.count)).transpose(1, 2)
    out = attend(own, ExactPast(keys, values, part.mask), paged, attention.scale, attention._softcap)
    output[part.tokens] = out.transpose(1, 2).flatten(0, 1)


def _paged(codes: Codes, part: Part, layer: str) -> PagedPast:
    """The pages of a part as attention of a layer reads them: in place for single tokens, for more from one copy for all layers."""
    real, shape = codes.layers[layer], codes.sizes.shape
    in_place = part.count == 1
    return PagedPast(
        tiles=[codes.pages if in_place else part.in_order(codes.pages)],
        tokens=part.pages.shape[1] * shape.page_tokens,
        first=part.first,
        largest_first=shape.sinks,
        offset=part.offset,
        key_readers=codes.coder.readers(real.index, "key"),
        value_readers=codes.coder.readers(real.index, "value"),
        rotary=real.rotary,
        shown=part.shown,
        table=part.pages if in_place else None,
    )
