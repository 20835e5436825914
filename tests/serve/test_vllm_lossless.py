"""The compressed cache in vLLM's memory with plans that lose nothing: the same tokens as vLLM's own cache gives."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tiny import tiny_model

pytest.importorskip("vllm", reason="vLLM is not installed; .ci/engines makes an environment for these tests")

from vllm_engine import DIVERGING, MANY, PLAIN, POSITIONS, engine, saved, slots

import kvcar
from kvcar.bundle import CodedBlock
from kvcar.plan import Block, CacheConfig
from kvcar.serve.vllm.sizes import WindowBlocks, choose_blocks

PAGES = {"page_tokens": 64, "window": 64, "sinks": 4}


@pytest.fixture(scope="module")
def model():
    return tiny_model(head_dim=32, max_position_embeddings=POSITIONS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("vllm")


@pytest.fixture(scope="module")
def stock(model, folder):
    """What vLLM's own cache gives: of the prompts, of those that begin as one of them, and of many at once."""
    with engine(saved(model, None, folder)[0]) as own:
        return [own.generate(PLAIN).tokens, own.generate(DIVERGING).tokens, own.generate(MANY, 200).tokens]


def lossless_blocks(model, blocks, **cache):
    """A bundle that codes nothing, with the given blocks."""
    whole = kvcar.lossless(model, cache=CacheConfig(**(PAGES | cache)))
    plan = whole.plan.model_copy(update={"blocks": tuple(Block(codec="identity", slots=own) for own in blocks)})
    return replace(
        whole, plan=type(plan).from_json(plan.to_json()), blocks=tuple(CodedBlock(None, None) for _ in blocks)
    )


WITHIN = [slots([layer], [kind]) for layer in range(4) for kind in ("key", "value")]
ACROSS = [slots([3, 1], ["value"], [0]), slots([0, 2]), slots([1, 3], ["key"]), slots([1, 3], ["value"], [1])]


@pytest.mark.parametrize(
    ("blocks", "cache", "tokens_of_a_pass"),
    [
        (WITHIN, {}, None),
        (ACROSS, {}, None),
        (ACROSS, {"sinks": 0}, 2048),
        (WITHIN, {"page_tokens": 32, "window": 0, "sinks": 8}, 100),
        (ACROSS, {"window": 128}, 300),
    ],
    ids=[
        "blocks within layers",
        "blocks across layers",
        "no sinks, no chunks",
        "no window, chunks",
        "wide window, chunks",
    ],
)
def test_lossless_plans_give_the_tokens_of_vllms_own_cache(model, folder, stock, blocks, cache, tokens_of_a_pass):
    where, bundle = saved(model, lossless_blocks(model, blocks, **cache), folder)
    own = {} if tokens_of_a_pass is None else {"max_num_batched_tokens": tokens_of_a_pass}
    with engine(where, bundle, own) as ours:
        assert [ours.generate([each]).tokens[0] for each in PLAIN[:5]] == stock[0][:5]
        ours.forget()
        together = ours.generate(PLAIN)
        assert (together.tokens, together.hits) == (stock[0], [0] * len(PLAIN))
        again = ours.generate(PLAIN)
        assert again.tokens == stock[0]
        assert again.hits[-1] >= 512
        diverging = ours.generate(DIVERGING)
        assert diverging.tokens == stock[1]
        assert max(diverging.hits) >= 256


def test_preempted_requests_give_the_same_tokens(model, folder, stock):
    where, bundle = saved(model, lossless_blocks(model, ACROSS), folder)
    with engine(where, bundle, kv_cache_memory_bytes=4 << 20) as ours:
        assert ours.generate(MANY, 200).tokens == stock[2]
        assert ours.preemptions > 0
        # Prompts that were preempted left blocks behind; hits of them are as good.
        assert ours.generate(MANY, 200).tokens == stock[2]


def test_layers_with_blocks_of_several_sizes_give_the_same_tokens(model, folder, stock, monkeypatch):
    def chosen(shape, tokens, in_flight):
        own = choose_blocks(shape, tokens, in_flight)
        return replace(own, windows=(WindowBlocks(3, 16, 1), WindowBlocks(1, 128, 1)))

    monkeypatch.setattr("kvcar.serve.vllm.start.choose_blocks", chosen)
    where, bundle = saved(model, lossless_blocks(model, ACROSS), folder)
    with engine(where, bundle, kv_cache_memory_bytes=32 << 20) as ours:
        assert ours.generate(PLAIN).tokens == stock[0]
        again, diverging = ours.generate(PLAIN), ours.generate(DIVERGING)
        assert (again.tokens, diverging.tokens) == tuple(stock[:2])
        assert again.hits[-1] == 512
        assert max(diverging.hits) >= 256
    with engine(where, bundle, kv_cache_memory_bytes=5 << 20) as ours:
        assert ours.generate(MANY, 200).tokens == stock[2]
        assert ours.preemptions > 0


@pytest.mark.parametrize("cache", [{}, {"sinks": 0}, {"page_tokens": 32, "window": 0}], ids=str)
def test_requests_that_begin_alike_in_one_pass_give_the_same_tokens(model, folder, cache):
    alike = [PLAIN[-1], PLAIN[-1], PLAIN[-1][:599], *DIVERGING, PLAIN[-1][:320], PLAIN[-1][:321]]
    with engine(saved(model, None, folder)[0]) as own:
        expected = own.generate(alike).tokens
    where, bundle = saved(model, lossless_blocks(model, ACROSS, **cache), folder)
    with engine(where, bundle, {"max_num_batched_tokens": 700}, kv_cache_memory_bytes=32 << 20) as ours:
        together = ours.generate(alike)
        assert together.hits[1] >= 512  # of pages that the first request fills in the same pass
        assert together.tokens == expected
