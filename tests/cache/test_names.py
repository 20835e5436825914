"""Modules of transformers call a cache ``past_key_values``, or ``cache`` from 5.24 on: every name that is taken works."""

import inspect
import warnings

import pytest
import torch
from bundles import fitted
from tiny import tiny_model, token_ids
from transformers import LlamaForCausalLM

import kvcar
from kvcar.cache.attach import prefill
from kvcar.models.structure import CACHE_NAMES, cache_argument

NAMES = ["past_key_values", *({"cache"} & inspect.signature(LlamaForCausalLM.forward).parameters.keys())]


@pytest.fixture(scope="module")
def llama():
    model = tiny_model("llama")
    return model, fitted(model, times_smaller=4, layers_per_block=2)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_generate_takes_a_cache_by_every_name(llama, name, options):
    model, bundle = llama
    # Without an end of its own, looking prompts up fails in transformers 5.9.
    asked = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": 1, "pad_token_id": 0} | options
    with kvcar.attach(model, bundle, prefill_chunk=64) as attached:
        expected = model.generate(token_ids(200), **asked)
        cache = attached.new_cache()
        assert torch.equal(model.generate(token_ids(200), **{name: cache}, **asked), expected)
        assert cache.tokens >= 207


@pytest.mark.parametrize("name", NAMES)
def test_model_and_decoder_take_a_cache_by_every_name(llama, name):
    model, bundle = llama
    with kvcar.attach(model, bundle) as attached, torch.no_grad():
        outer, inner = attached.new_cache(), attached.new_cache()
        for part in token_ids(200).split(50, dim=1):
            logits = model(part, **{name: outer}).logits
            hidden = model.model(part, **{name: inner}).last_hidden_state
        assert torch.equal(logits, model.lm_head(hidden))
        assert outer.paged_tokens == inner.paged_tokens > 0


def test_kvcar_itself_uses_the_name_of_the_day(llama, tmp_path):
    model, _ = llama
    assert set(cache_argument(model, kvcar.KVCarCache(kvcar.lossless(model)))) <= set(CACHE_NAMES)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        bundle = kvcar.fit(model, token_ids=token_ids(256, batch=12, seed=7), times_smaller=3)
        kvcar.evaluate(model, bundle, token_ids=token_ids(256, batch=2, seed=8))
        with kvcar.attach(model, bundle) as attached:
            cache = attached.new_cache()
            prefill(model, cache, token_ids(100))
            model.generate(token_ids(100), max_new_tokens=2)


def test_assisted_generation_over_compressed_caches_says_what_plain_generation_says(llama):
    model, _ = llama
    with kvcar.attach(model, kvcar.lossless(model)):
        options = {"max_new_tokens": 12, "do_sample": False}
        plain = model.generate(token_ids(150), **options)
        assert torch.equal(model.generate(token_ids(150), assistant_model=tiny_model("llama"), **options), plain)


@pytest.mark.parametrize("seed", [0, 1], ids=["the same weights", "others"])
def test_an_assistant_may_be_attached_too(llama, seed):
    """It goes on after a past of its own, with options that the model's were copied to."""
    model, _ = llama
    assistant = tiny_model("llama", seed=seed)
    options = {"max_new_tokens": 12, "do_sample": False}
    with kvcar.attach(model, kvcar.lossless(model)):
        plain = model.generate(token_ids(150), **options)
        with kvcar.attach(assistant, kvcar.lossless(assistant)):
            assert torch.equal(model.generate(token_ids(150), assistant_model=assistant, **options), plain)
