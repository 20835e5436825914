"""Sizes of vLLM's blocks: pages of codes and blocks of exact tokens lie in one pool, so both must fill a block.

vLLM (``_get_packed_kv_cache_groups``) makes a block as large as a page of codes, or as one layer's exact tokens where those are larger. It
puts as many layers with blocks of equally many tokens side by side as fit a block, and makes further groups, with blocks of their own, of the
rest. Of layers that are left over a block holds more tokens, so that it is filled too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_MOST_ROUNDING = 1.25
"""A page of codes may grow by this factor so that exact tokens of more layers fit beside each other."""
_LONGEST_HIT_STEP = 3
"""Prefix hits end at common multiples of a page and a block of exact tokens: at most so many pages apart."""
_PRICE_OF_A_STEP = 0.005
"""Share of its memory that a sequence may take more for prefix hits a page closer to each other."""


@dataclass(frozen=True)
class CacheShape:
    """What is to be stored.

    Attributes:
        layers: attention layers, all alike.
        layer_bytes: bytes of exact keys and values of one token in one layer.
        page_tokens: tokens of a page of codes.
        page_bytes: bytes of a page of codes of all layers.
        window: tokens before a query that it reads exactly at least; from there on to the end of a page.
        sinks: first tokens that stay exact.
    """

    layers: int
    layer_bytes: int
    page_tokens: int
    page_bytes: int
    window: int
    sinks: int

    @property
    def kept(self) -> int:
        """Tokens before a query that are kept exactly at least, also where none is read."""
        return max(1, self.window)

    @property
    def exact_bytes(self) -> int:
        """Bytes of exact keys and values of one token in all layers."""
        return self.layers * self.layer_bytes


@dataclass(frozen=True)
class WindowBlocks:
    """How exact keys and values of some layers are cut.

    Attributes:
        layers: that are cut so.
        tokens: of a block.
        groups: that vLLM makes of the layers.
    """

    layers: int
    tokens: int
    groups: int


@dataclass(frozen=True)
class BlockSizes:
    """How the pool is cut.

    Attributes:
        shape: what is stored.
        code_bytes: bytes of codes of one token, of which ``page_tokens`` make a page.
        windows: blocks of exact tokens, of all layers together.
    """

    shape: CacheShape
    code_bytes: int
    windows: tuple[WindowBlocks, ...]

    @property
    def block_bytes(self) -> int:
        """Bytes of a block of the pool."""
        largest = max(window.tokens for window in self.windows)
        return max(self.code_bytes * self.shape.page_tokens, largest * self.shape.layer_bytes)

    @property
    def hit_step(self) -> int:
        """Prefix hits end at multiples of so many tokens."""
        return math.lcm(self.shape.page_tokens, *(window.tokens for window in self.windows))

    @property
    def groups(self) -> int:
        """Groups that vLLM makes of the layers' exact tokens."""
        return sum(window.groups for window in self.windows)

    def window_tokens(self, place: int) -> int:
        """Tokens of a block of exact tokens of the layer that is at ``place`` among all."""
        for window in self.windows:
            if place < window.layers:
                return window.tokens
            place -= window.layers
        raise IndexError(f"there are blocks for {self.shape.layers} layers")

    def window_blocks(self, in_flight: int = 1) -> int:
        """Blocks of exact tokens that a long sequence has in all groups, ``in_flight`` of its tokens being computed."""
        shape, first = self.shape, 1 if self.shape.sinks else 0
        return sum(
            own.groups * (blocks_at_once(own.tokens, shape.kept, shape.page_tokens, in_flight) + first)
            for own in self.windows
        )

    def sequence_bytes(self, tokens: int, in_flight: int = 1) -> int:
        """Bytes of the pool that a sequence takes; one that is shorter than the window counts as if it filled it."""
        return self.block_bytes * (-(-tokens // self.shape.page_tokens) + self.window_blocks(in_flight))


def blocks_at_once(block_tokens: int, kept: int, page_tokens: int, in_flight: int) -> int:
    """Count the blocks of exact tokens that a sequence has at most, sinks apart.

    What is let go ends with a page, so what is left begins at few places of a block: at its first token where blocks divide a page.

    Args:
        block_tokens: tokens of a block.
        kept: tokens before a query that are kept exactly at least.
        page_tokens: tokens of a page.
        in_flight: tokens being computed.
    """
    latest_start = block_tokens - math.gcd(block_tokens, page_tokens)
    return -(-(latest_start + kept + page_tokens - 1 + in_flight) // block_tokens)


def choose_blocks(shape: CacheShape, tokens: int, in_flight: int, step_bytes: int = 16) -> BlockSizes:
    """Choose the sizes by which a sequence of ``tokens`` tokens takes the least memory.

    Args:
        shape: what is stored.
        tokens: of the sequences to choose for.
        in_flight: tokens of a sequence that may be computed at once.
        step_bytes: what the bytes of a token's codes must be a multiple of.
    """

    def price(sizes: BlockSizes) -> tuple[float, int, int]:
        more_pages = sizes.hit_step // shape.page_tokens - 1
        own = sizes.sequence_bytes(tokens, in_flight) * (1 + _PRICE_OF_A_STEP * more_pages)
        return own, sizes.groups, max(window.tokens for window in sizes.windows)

    return min(_candidates(shape, step_bytes), key=price)


def _candidates(shape: CacheShape, step_bytes: int) -> Iterator[BlockSizes]:
    allowed = [
        tokens
        for tokens in range(max(1, shape.sinks), _LONGEST_HIT_STEP * shape.page_tokens + 1)
        if math.lcm(tokens, shape.page_tokens) <= _LONGEST_HIT_STEP * shape.page_tokens
    ]
    for code_bytes in _code_bytes(shape, allowed, step_bytes):
        for first in allowed:
            for rest in allowed:
                sizes = BlockSizes(shape, code_bytes, _windows(shape, code_bytes, first, rest))
                if sizes.hit_step <= _LONGEST_HIT_STEP * shape.page_tokens:
                    yield sizes


def _code_bytes(shape: CacheShape, allowed: Sequence[int], step_bytes: int) -> list[int]:
    """What a token's codes may take: as little as they need, or so much that exact tokens of some layers fill a block."""
    smallest = _rounded_up(-(-shape.page_bytes // shape.page_tokens), step_bytes)
    needed = [n * tokens * shape.layer_bytes for tokens in allowed for n in range(1, shape.layers + 1)]
    filled = {_rounded_up(-(-own // shape.page_tokens), step_bytes) for own in needed}
    return [smallest, *sorted(own for own in filled if smallest < own <= _MOST_ROUNDING * smallest)]


def _windows(shape: CacheShape, code_bytes: int, first: int, rest: int) -> tuple[WindowBlocks, ...]:
    """Cut as many layers as fill whole groups in blocks of ``first`` tokens, and those that are left in blocks of ``rest``."""
    block = max(code_bytes * shape.page_tokens, first * shape.layer_bytes)
    together = min(shape.layers, block // (first * shape.layer_bytes))
    groups, left = divmod(shape.layers, together)
    if not left:
        return (WindowBlocks(shape.layers, first, groups),)
    if first == rest or rest * shape.layer_bytes > block:
        return (WindowBlocks(shape.layers, first, groups + 1),)
    more = -(-left // (block // (rest * shape.layer_bytes)))
    return WindowBlocks(shape.layers - left, first, groups), WindowBlocks(left, rest, more)


def _rounded_up(number: int, step: int) -> int:
    return -(-number // step) * step
