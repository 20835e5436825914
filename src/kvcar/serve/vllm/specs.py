# pyright: reportMissingImports=false
"""What vLLM is told of the exact tokens: a window that slides by whole pages, the first block, with the sinks, never let go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.v1.core.kv_cache_utils import resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import register_kv_cache_spec

from .sizes import blocks_at_once


class WindowManager(SlidingWindowManager):
    """Blocks of a window that slides by whole pages: it begins where the pages end that the next query reads from codes."""

    def get_num_skipped_tokens(self, num_computed_tokens: int) -> int:
        """Count the tokens before the window, all of whose pages are full."""
        page = self.kv_cache_spec.page_tokens
        return super().get_num_skipped_tokens(num_computed_tokens) // page * page


class SinkWindowManager(WindowManager):
    """Blocks of such a window, and the first block of every sequence with it."""

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Any,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: Any,
        kv_cache_spec: Any,
        drop_eagle_block: bool,
        alignment_tokens: int,
        dcp_world_size: int = 1,
        pcp_world_size: int = 1,
    ) -> tuple[tuple[list[Any], ...], int]:
        """Find the longest prefix whose window is there, if its first block is there too; otherwise nothing is a hit."""
        found, length = super().find_longest_cache_hit(
            block_hashes, max_length, kv_cache_group_ids, block_pool, kv_cache_spec, drop_eagle_block,
            alignment_tokens, dcp_world_size, pcp_world_size,
        )  # fmt: skip
        if not found[0] or not found[0][0].is_null:
            return found, length
        hashes = resolve_block_hashes(
            block_hashes, block_pool.hash_block_size, kv_cache_spec.block_size,
            supports_fine_grained_hash_lookup=cls.supports_fine_grained_hash_lookup, alignment_tokens=alignment_tokens,
        )  # fmt: skip
        first = block_pool.get_cached_block(hashes[0], kv_cache_group_ids)
        if first is None:
            return tuple([] for _ in kv_cache_group_ids), 0
        for blocks, block in zip(found, first, strict=True):
            blocks[0] = block
        return found, length

    @classmethod
    def reachable_block_mask(cls, start_block: int, end_block: int, *args: Any, **kwargs: Any) -> list[bool] | None:
        """Say which blocks a later request may hit: those of a sliding window, and the first one."""
        mask = super().reachable_block_mask(start_block, end_block, *args, **kwargs)
        if mask and start_block == 0:
            mask[0] = True
        return mask

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[Any],
        total_computed_tokens: int,
        *args: Any,
        **kwargs: Any,
    ) -> int:
        """Count blocks as a sliding window does, and the first block where a hit takes it out of the free ones."""
        count = super().get_num_blocks_to_allocate(
            request_id, num_tokens, new_computed_blocks, total_computed_tokens, *args, **kwargs
        )
        if self._skips_first(new_computed_blocks, total_computed_tokens):
            count += self._get_num_evictable_blocks(new_computed_blocks[:1])
        return count

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[Any],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        """Take in the blocks of a hit; the first one, which a sliding window leaves out, is put back and held."""
        super().add_local_computed_blocks(
            request_id, new_computed_blocks, num_local_computed_tokens, num_external_computed_tokens
        )
        total = num_local_computed_tokens + num_external_computed_tokens
        if self._skips_first(new_computed_blocks, total):
            self.block_pool.touch(new_computed_blocks[:1])
            self.req_to_blocks[request_id][0] = new_computed_blocks[0]

    def remove_skipped_blocks(self, request_id: str, *args: Any, **kwargs: Any) -> None:
        """Let go of what is before the window, but not of the first block."""
        blocks = self.req_to_blocks.get(request_id)
        if not blocks or blocks[0] is self._null_block:
            super().remove_skipped_blocks(request_id, *args, **kwargs)
            return
        # The base class frees from the end of what is skipped until it meets a null block: one in the first place stops it.
        first, blocks[0] = blocks[0], self._null_block
        try:
            super().remove_skipped_blocks(request_id, *args, **kwargs)
        finally:
            blocks[0] = first

    def _skips_first(self, new_computed_blocks: Sequence[Any], total_computed_tokens: int) -> bool:
        """Whether the first block of a hit is before the window, so that a sliding window would leave it out."""
        skipped = self.get_num_skipped_tokens(total_computed_tokens) // self.block_size
        return skipped > 0 and len(new_computed_blocks) > 0 and not new_computed_blocks[0].is_null


@register_kv_cache_spec(manager_class=WindowManager, uniform_type_base_spec=SlidingWindowSpec)
@dataclass(frozen=True, kw_only=True)
class WindowSpec(SlidingWindowSpec):
    """A window that slides by whole pages, and tells the engine how many tokens a pass may have.

    Attributes:
        page_tokens: of a page of codes.
        tokens_of_a_pass: at most; 0 for as many as vLLM's configuration says.
    """

    page_tokens: int = 1
    tokens_of_a_pass: int = 0

    def max_admission_blocks_per_request(self, max_in_flight_tokens: int, max_model_len: int) -> int:
        """Count the most blocks that a sequence has at once."""
        most = blocks_at_once(self.block_size, self.sliding_window - 1, self.page_tokens, max_in_flight_tokens)
        return min(most, -(-max_model_len // self.block_size))

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        """Count bytes of a sequence, after vLLM's configuration has been lowered to ``tokens_of_a_pass``.

        The worker may be a process of its own; a spec is what goes from it to the engine, which asks this before it makes its scheduler.
        """
        limit_batch(vllm_config.scheduler_config, self.tokens_of_a_pass)
        return super().max_memory_usage_bytes(vllm_config)


@register_kv_cache_spec(manager_class=SinkWindowManager, uniform_type_base_spec=SlidingWindowSpec)
@dataclass(frozen=True, kw_only=True)
class SinkWindowSpec(WindowSpec):
    """Such a window and the first block of a sequence."""

    # From 0.33 on vLLM may blank what is before so many tokens; nothing must be, as the first block is read.
    num_retained_tokens = 0

    def max_admission_blocks_per_request(self, max_in_flight_tokens: int, max_model_len: int) -> int:
        """Count the most blocks that a sequence has at once: those of the window, and the first."""
        return super().max_admission_blocks_per_request(max_in_flight_tokens, max_model_len) + 1


def limit_batch(scheduler: Any, tokens: int) -> bool:
    """Lower the tokens of a pass, and with them the requests that run at a time, in vLLM's configuration; say whether they fell."""
    if not 0 < tokens < scheduler.max_num_batched_tokens:
        return False
    scheduler.max_num_batched_tokens = tokens
    # Beyond that, the last of many requests would have no turn before the first are done.
    scheduler.max_num_seqs = min(scheduler.max_num_seqs, tokens)
    if scheduler.max_num_scheduled_tokens is not None:
        scheduler.max_num_scheduled_tokens = min(scheduler.max_num_scheduled_tokens, tokens)
    return True
