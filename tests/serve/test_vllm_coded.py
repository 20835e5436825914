"""The compressed cache in vLLM's memory with codes: the same tokens as in transformers, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
from bundles import by_hand, fitted
from tiny import tiny_model

pytest.importorskip("vllm", reason="vLLM is not installed; .ci/engines makes an environment for these tests")

from vllm_engine import DIVERGING, MANY, PLAIN, POSITIONS, engine, expected_of, prompt, saved, slots

import kvcar
from kvcar.bundle import CodedBlock
from kvcar.errors import InputError, ModelMismatchError, PlanError, UnsupportedModelError

PAGES = {"page_tokens": 64, "window": 64, "sinks": 4}


@pytest.fixture(scope="module")
def model():
    return tiny_model(head_dim=32, max_position_embeddings=POSITIONS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("vllm")


@pytest.fixture(scope="module")
def stock(model):
    """The tokens without a compressed cache."""
    return expected_of(model, PLAIN)


CODED = [slots([0, 2]), slots([1], ["key"]), slots([3], ["key"]), slots([1, 3], ["value"])]
BITS = [7, 6, 5, 4]
ASKED = [*PLAIN, *DIVERGING]
ROUNDING = 0.02


@pytest.fixture(scope="module")
def coded(model, folder):
    """Folders of the model and of a bundle of some three times smaller."""
    return saved(model, by_hand(model, CODED, BITS, **PAGES), folder)


@pytest.fixture(scope="module")
def ours_coded(coded):
    """What one engine with that bundle gives, asked in several ways, and how many blocks it has."""
    with engine(*coded) as ours:
        alone = [(ours.scores([each])[0], ours.forget())[0] for each in ASKED]
        made = {"alone": alone, "together": ours.scores(ASKED)}
        made["again"], made["hits"] = ours.scores(ASKED), ours.generate(ASKED, 1).hits
        ours.forget()
        texts = [ours.generate([each]).tokens[0] for each in PLAIN]
        many = ours.generate(MANY, 200).tokens
        assert ours.preemptions == 0
        return {**made, "texts": texts, "many": many, "blocks": ours.blocks}


def difference(first, second):
    """Largest difference of log-probabilities; a code that lies between two values may go either way as sums are rounded."""
    return max(abs(a[t] - b[t]) for a, b in zip(first, second, strict=True) for t in a.keys() & b.keys())


def agreement(first, second):
    """Share of greedy tokens up to where two texts part, on average over sequences longer than the window.

    Not always 1 for what is the same: a code that lies between two values goes either way as sums are rounded.
    """
    pairs = list(zip(first, second, strict=True))[-4:]
    shares = [next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a)) / len(a) for a, b in pairs]
    return sum(shares) / len(shares)


def test_coded_plans_give_the_tokens_that_they_give_in_transformers(model, coded, stock, ours_coded):
    with kvcar.attach(model, kvcar.Bundle.from_pretrained(coded[1]), prefill_chunk=64):
        expected = expected_of(model, PLAIN)
    assert agreement(expected, stock) < 0.5  # codes show
    assert agreement(ours_coded["texts"], expected) > 0.7


def test_codecs_in_8_bits_with_means_of_pages_give_them_too(model, folder):
    options = {
        "codec": "linear8",
        "metric": "effect",
        "times_smaller": 3,
        "layers_per_block": 2,
        "page_means": True,
        "trellis": True,
    }
    bundle = fitted(model, max_page_cost=None, **options, **PAGES)
    with kvcar.attach(model, bundle, prefill_chunk=64):
        expected = expected_of(model, PLAIN[2:])
    with engine(*saved(model, bundle, folder)) as ours:
        assert agreement(ours.generate(PLAIN[2:]).tokens, expected) > 0.6


def test_other_requests_and_prefix_hits_play_no_part(coded, ours_coded):
    assert difference(ours_coded["together"], ours_coded["alone"]) < ROUNDING
    assert difference(ours_coded["again"], ours_coded["alone"]) < ROUNDING
    assert sum(hits >= 192 for hits in ours_coded["hits"]) >= 4
    with engine(coded[0]) as own:
        assert difference(own.scores(ASKED), ours_coded["alone"]) > 10 * ROUNDING


def test_a_pass_of_fewer_tokens_gives_the_same_and_preempted_requests_do(coded, ours_coded):
    options = {"kv_cache_memory_bytes": 2 << 20}
    with engine(*coded, {"max_num_batched_tokens": 48}, **options) as ours:
        assert ours.config.scheduler_config.max_num_batched_tokens == 48
        assert ours.blocks < ours_coded["blocks"]
        assert difference(ours.scores(ASKED), ours_coded["alone"]) < ROUNDING
        assert agreement(ours.generate(MANY, 200).tokens, ours_coded["many"]) > 0.6
        assert ours.preemptions > 0


def test_a_pass_of_more_tokens_reads_more_exactly(coded, ours_coded):
    with engine(*coded, {"max_num_batched_tokens": 1024}) as ours:
        large = [ours.scores([each])[0] for each in ASKED]
    with engine(coded[0]) as own:
        exact = own.scores(ASKED)
    # What fits a window and a page reads no codes either way; of 600 tokens at once the prompt reads none.
    assert difference(large[:3], ours_coded["alone"][:3]) < ROUNDING
    assert difference(large[6:7], exact[6:7]) < ROUNDING
    assert difference(large[6:7], ours_coded["alone"][6:7]) > 3 * ROUNDING


def test_a_load_for_which_vllms_own_cache_is_too_small_fits(coded):
    prompts = [prompt(600, seed) for seed in range(30, 38)]
    with engine(coded[0]) as own:
        own.generate(prompts, 64)
        assert own.preemptions > 0
    with engine(*coded) as ours:
        ours.generate(prompts, 64)
        assert ours.preemptions == 0


def test_ruined_codecs_change_the_text(model, coded, folder, ours_coded):
    bundle = kvcar.Bundle.from_pretrained(coded[1])
    blocks = list(bundle.blocks)
    tensors = {name: t.roll(1, 0) for name, t in blocks[0].tensors().items()}
    blocks[0] = CodedBlock.from_tensors(tensors, bundle.plan.blocks[0], bundle.plan)
    with engine(*saved(model, replace(bundle, blocks=tuple(blocks)), folder)) as ours:
        got = ours.generate(PLAIN).tokens
    expected = ours_coded["texts"]
    assert got[0] == expected[0]  # ten tokens are all in the window
    assert all(a != b for a, b in zip(got[4:], expected[4:], strict=True))


def refused(kind, match, *args, **options):
    with pytest.raises(kind, match=match), engine(*args, **options):
        pass


def test_what_is_not_supported_is_refused(model, coded, folder, tmp_path, monkeypatch):
    other = tiny_model(head_dim=32, max_position_embeddings=POSITIONS, seed=1)
    refused(ModelMismatchError, "sampled weights differ", saved(other, None, tmp_path / "other")[0], coded[1])
    fewer = tiny_model(head_dim=32, max_position_embeddings=POSITIONS, num_hidden_layers=2)
    refused(ModelMismatchError, "for 4 layers", saved(fewer, None, tmp_path / "fewer")[0], coded[1])
    part = saved(model, by_hand(model, CODED[1:2], **PAGES), folder)
    refused(PlanError, r"keeps layers \[0, 2, 3\]", *part)
    refused(UnsupportedModelError, "hybrid KV cache manager is off", *coded, disable_hybrid_kv_cache_manager=True)
    connector = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
    refused(UnsupportedModelError, "cannot be used: a KV connector is set", *coded, kv_transfer_config=connector)
    refused(
        UnsupportedModelError,
        "would wait for ever.* at least max_model_len, 1024",
        *coded,
        enable_chunked_prefill=False,
    )
    refused(InputError, "may be added", *coded, {"windows": 3})
    refused(InputError, "whole number", *coded, {"max_num_batched_tokens": "many"})
    refused(InputError, "add --additional-config.*which is {}", coded[0], attention_backend="CUSTOM")
    named = {"additional_config": {"kvcar": {"bundle": "here"}}}
    refused(InputError, "add --attention-backend CUSTOM, which is not given", coded[0], **named)
    refused(InputError, "which is TRITON_ATTN", coded[0], attention_backend="TRITON_ATTN", **named)
    monkeypatch.setattr("kvcar.serve.vllm.checks.VLLM_VERSION", "0.99.0")
    refused(UnsupportedModelError, "this is 0.99.0", *coded)
