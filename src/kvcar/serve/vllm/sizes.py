"""Sizes of vLLM's blocks: pages of codes and blocks of exact tokens lie in one pool, so both must fill a block.

vLLM (``_get_packed_kv_cache_groups``) makes a block as large as a page of codes, or as one layer's exact tokens where those are larger. It
puts as many layers side by side as fit a block, and makes further groups of layers, with blocks of their own, of the rest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

_MOST_ROUNDING = 1.25
"""A page of codes may grow by this factor so that exact tokens of more layers fit beside each other."""
_LONGEST_HIT_STEP = 3
"""Prefix hits end at common multiples of a page and a block of exact tokens: at most so many pages apart."""
_PRICE_OF_A_STEP = 0.01
"""Share of its memory that a sequence may take more for prefix hits a page closer to each other."""


@dataclass(frozen=True)
class CacheShape:
    """What is to be stored.

    Attributes:
        layers: attention layers, all alike.
        layer_bytes: bytes of exact keys and values of one token in one layer.
        page_tokens: tokens of a page of codes.
        page_bytes: bytes of a page of codes of all layers.
        window: most recent tokens that a query may read exactly, itself included.
        sinks: first tokens that stay exact.
    """

    layers: int
    layer_bytes: int
    page_tokens: int
    page_bytes: int
    window: int
    sinks: int

    @property
    def exact_bytes(self) -> int:
        """Bytes of exact keys and values of one token in all layers."""
        return self.layers * self.layer_bytes


@dataclass(frozen=True)
class BlockSizes:
    """How the pool is cut.

    Attributes:
        shape: what is stored.
        window_tokens: tokens of a block of exact keys and values.
        code_bytes: bytes of codes of one token, of which ``page_tokens`` make a page.
    """

    shape: CacheShape
    window_tokens: int
    code_bytes: int

    @property
    def block_bytes(self) -> int:
        """Bytes of a block of the pool."""
        return max(self.code_bytes * self.shape.page_tokens, self.window_tokens * self.shape.layer_bytes)

    @property
    def hit_step(self) -> int:
        """Prefix hits end at multiples of so many tokens."""
        return math.lcm(self.window_tokens, self.shape.page_tokens)

    @property
    def groups(self) -> int:
        """Groups that vLLM makes of the layers' exact tokens."""
        together = self.block_bytes // (self.window_tokens * self.shape.layer_bytes)
        return -(-self.shape.layers // together)

    def window_blocks(self, in_flight: int = 1) -> int:
        """Blocks of exact tokens that a long sequence has in all groups, ``in_flight`` of its tokens being computed."""
        tokens = self.shape.window - 1 + in_flight
        own = -(-tokens // self.window_tokens) + 1 + (1 if self.shape.sinks else 0)
        return self.groups * own

    def sequence_bytes(self, tokens: int, in_flight: int = 1) -> int:
        """Bytes of the pool that a sequence takes; one that is shorter than the window counts as if it filled it."""
        return self.block_bytes * (-(-tokens // self.shape.page_tokens) + self.window_blocks(in_flight))


def choose_blocks(shape: CacheShape, tokens: int, in_flight: int, step_bytes: int = 16) -> BlockSizes:
    """Choose the sizes by which a sequence of ``tokens`` tokens takes the least memory.

    Args:
        shape: what is stored.
        tokens: of the sequences to choose for.
        in_flight: tokens of a sequence that may be computed at once.
        step_bytes: what the bytes of a token's codes must be a multiple of.
    """

    def price(sizes: BlockSizes) -> tuple[float, int]:
        more_pages = sizes.hit_step // shape.page_tokens - 1
        return sizes.sequence_bytes(tokens, in_flight) * (1 + _PRICE_OF_A_STEP * more_pages), sizes.groups

    return min(_candidates(shape, step_bytes), key=price)


def _candidates(shape: CacheShape, step_bytes: int) -> Iterator[BlockSizes]:
    smallest = _rounded_up(-(-shape.page_bytes // shape.page_tokens), step_bytes)
    for window_tokens in range(max(1, shape.sinks), shape.page_tokens + 1):
        if math.lcm(window_tokens, shape.page_tokens) > _LONGEST_HIT_STEP * shape.page_tokens:
            continue
        yield BlockSizes(shape, window_tokens, smallest)
        for together in range(1, shape.layers + 1):
            needed = together * window_tokens * shape.layer_bytes
            code_bytes = _rounded_up(-(-needed // shape.page_tokens), step_bytes)
            if smallest < code_bytes <= _MOST_ROUNDING * smallest:
                yield BlockSizes(shape, window_tokens, code_bytes)


def _rounded_up(number: int, step: int) -> int:
    return -(-number // step) * step
