"""Sizes of vLLM's blocks: what a sequence takes at most, and how many fit."""

from __future__ import annotations

import pytest

from kvcar.serve.vllm.sizes import CacheShape, blocks_at_once, choose_blocks

SMOLLM2 = {"layers": 30, "layer_bytes": 768, "page_tokens": 64, "window": 64, "sinks": 4}  # of 135M, bfloat16
LLAMA_8B = SMOLLM2 | {"layers": 32, "layer_bytes": 4096}


@pytest.mark.parametrize("block_tokens", [1, 6, 8, 12, 16, 48, 64, 128, 192])
@pytest.mark.parametrize(("kept", "in_flight"), [(64, 64), (64, 1), (1, 40), (100, 128)])
def test_a_sequence_never_has_more_blocks_than_are_booked(block_tokens, kept, in_flight):
    had = []
    for computed in range(2000):
        begin = max(0, computed - kept) // 64 * 64
        had.append(-(-(computed + in_flight) // block_tokens) - begin // block_tokens)
    assert max(had) == blocks_at_once(block_tokens, kept, 64, in_flight)


@pytest.mark.parametrize(
    ("shape", "page_bytes", "least"),
    [(SMOLLM2, 340_464, 3.8), (LLAMA_8B, 1_951_744, 3.8), (SMOLLM2, 159_120, 7.3), (LLAMA_8B, 905_216, 7.3)],
)
def test_sequences_of_8192_tokens_fit_nearly_as_many_times_as_pages_are_smaller(shape, page_bytes, least):
    sizes = choose_blocks(CacheShape(**shape, page_bytes=page_bytes), 8192, 64)
    assert sizes.shape.exact_bytes * 8192 / sizes.sequence_bytes(8192, 64) >= least
    assert sizes.hit_step <= 128


@pytest.mark.parametrize("page_bytes", [20_000, 97_840, 159_120, 340_464, 1_474_560])
@pytest.mark.parametrize("layers", [1, 4, 30])
def test_all_layers_fit_in_blocks_of_the_pool(layers, page_bytes):
    sizes = choose_blocks(CacheShape(**SMOLLM2 | {"layers": layers}, page_bytes=page_bytes), 8192, 64)
    assert sizes.block_bytes >= page_bytes
    assert sum(window.layers for window in sizes.windows) == layers
    for window in sizes.windows:
        # So many groups vLLM makes, by what a block takes of these layers.
        together = sizes.block_bytes // (window.tokens * 768)
        assert together >= 1
        assert window.groups == -(-window.layers // together)
        assert window.tokens >= 4  # sinks are in the first block
    tokens = [sizes.window_tokens(place) for place in range(layers)]
    assert tokens == [window.tokens for window in sizes.windows for _ in range(window.layers)]
    with pytest.raises(IndexError):
        sizes.window_tokens(layers)
