"""Going on from a filled cache: what works, and what is said where it cannot."""

import logging

import pytest
import torch
from bundles import fitted
from tiny import tiny_model, token_ids
from transformers import DynamicCache

import kvcar
from kvcar.errors import InputError


@pytest.fixture(scope="module")
def llama():
    model = tiny_model("llama")
    return model, fitted(model, times_smaller=4, layers_per_block=2)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("tokens", [5, 150, 200, 209])
def test_a_prompt_that_the_cache_has_already_is_refused_with_what_to_do(llama, tokens, masked):
    model, bundle = llama
    with kvcar.attach(model, bundle) as attached:
        cache = attached.new_cache()
        out = model.generate(token_ids(200), past_key_values=cache, max_new_tokens=10, do_sample=False)
        prompt = token_ids(tokens, seed=1)
        given = {"attention_mask": torch.ones_like(prompt)} if masked else {}
        with pytest.raises(InputError, match=f"has {tokens} tokens, and the cache has 209 already; to go on"):
            model.generate(prompt, past_key_values=cache, max_new_tokens=3, **given)
        more = model.generate(out, past_key_values=cache, max_new_tokens=3, do_sample=False)
    assert more.shape[1] == out.shape[1] + 3


def test_an_empty_pass_is_refused(llama):
    model, bundle = llama
    with kvcar.attach(model, bundle) as attached, torch.no_grad():
        cache = attached.new_cache()
        model(token_ids(100), past_key_values=cache)
        with pytest.raises(InputError, match="no new token"):
            model(token_ids(100)[:, :0], past_key_values=cache)


def test_a_cache_that_compresses_nothing_is_warned_of(llama, caplog):
    model, bundle = llama
    with kvcar.attach(model, bundle) as attached, caplog.at_level(logging.WARNING, logger="kvcar"):
        model.generate(token_ids(50), past_key_values=attached.new_cache(), max_new_tokens=2)
        assert not caplog.records
        model.generate(token_ids(50), past_key_values=DynamicCache(config=model.config), max_new_tokens=2)
        assert "a DynamicCache, which knows nothing of the bundle" in caplog.text
        caplog.clear()
        model.generate(token_ids(50), cache_implementation="static", max_new_tokens=2)
    assert "cache_implementation='static'" in caplog.text
