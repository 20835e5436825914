"""Models under torch.compile say what they say without it, and are not compiled again as the cache grows."""

import gc
import shutil

import pytest
import torch
from bundles import by_hand, fitted
from tiny import tiny_model, token_ids
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import DynamicCache, StaticCache

import kvcar
from kvcar.cache.attach import attachment_of
from kvcar.cache.attention import Current, attend_layer
from kvcar.cache.cache import KVCarCache
from kvcar.errors import AttachError, CacheStateError, UnsupportedModelError
from kvcar.geometry import Slot


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@torch.no_grad()
def logits_of_steps(forward, cache, prompt, following, mask=None):
    """Logits ``[B, 1 + N, V]`` after the prompt and after each step."""
    found = [forward(input_ids=prompt, past_key_values=cache, use_cache=True, attention_mask=mask).logits[:, -1:]]
    for i in range(following.shape[1]):
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        step = following[:, i : i + 1].contiguous()
        found.append(forward(input_ids=step, past_key_values=cache, use_cache=True, attention_mask=mask).logits)
    return torch.cat(found, 1)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_compiled_steps_say_the_same(family):
    model = tiny_model(family)
    bundle = fitted(model, times_smaller=3, layers_per_block=2)
    prompt, following = token_ids(150, batch=2), token_ids(70, seed=5, batch=2)
    with kvcar.attach(model, bundle):
        expected = logits_of_steps(model, KVCarCache(bundle), prompt, following)
        cache = KVCarCache(bundle)
        got = logits_of_steps(torch.compile(model.forward, backend="eager"), cache, prompt, following)
    assert cache.pages
    # Sliding layers get their masks written out where they are compiled, and so another kernel of PyTorch's.
    noise = 5e-5 if family == "gemma3" else 1e-5
    torch.testing.assert_close(got, expected, atol=noise, rtol=noise)


def test_a_growing_cache_is_compiled_for_once():
    # More layers than the compiler would put up with if it compiled each for itself.
    model = tiny_model("llama", num_hidden_layers=10)
    bundle = fitted(model, times_smaller=3, layers_per_block=2)
    counter = CompileCounterWithBackend("eager")
    with kvcar.attach(model, bundle):
        compiled = torch.compile(model.forward, backend=counter)
        for prompt in (100, 90):
            logits_of_steps(compiled, KVCarCache(bundle), token_ids(prompt), token_ids(2, seed=5))
        graphs = counter.frame_count
        logits_of_steps(compiled, KVCarCache(bundle), token_ids(110), token_ids(80, seed=6))
    assert counter.frame_count == graphs


def test_steps_are_one_graph_through_all_layers():
    model = tiny_model("llama", num_hidden_layers=2)
    bundle = fitted(model, times_smaller=3, layers_per_block=2)
    graphs = []

    def keep(graph, inputs):
        del inputs
        graphs.append(sum(node.target is torch.ops.kvcar.attend_layer.default for node in graph.graph.nodes))
        return graph.forward

    with kvcar.attach(model, bundle):
        cache = KVCarCache(bundle)
        logits_of_steps(model, cache, token_ids(100), token_ids(1, seed=5))
        logits_of_steps(torch.compile(model.forward, backend=keep), cache, token_ids(1), token_ids(2, seed=5))
    assert set(graphs) == {0, 2}, "the head apart, as the decoder's hooks run between"


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles with a C++ compiler")
def test_compiled_to_machine_code():
    """What inductor makes uses the memory of its tensors again, which the cache must not mind."""
    model = tiny_model("llama", num_hidden_layers=2)
    # The window holds all of it in full, so that nothing falls either way by rounding.
    bundle = by_hand(model, [(Slot(0, 0, "key"),), (Slot(1, 1, "value"),)], exact_dtype="model", window=256)
    prompt, following = token_ids(100, batch=2), token_ids(40, seed=5, batch=2)
    with kvcar.attach(model, bundle):
        expected = logits_of_steps(model, KVCarCache(bundle), prompt, following)
        got = logits_of_steps(torch.compile(model.forward), KVCarCache(bundle), prompt, following)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_padded_batches():
    model = tiny_model("llama", num_hidden_layers=2)
    bundle = fitted(model, times_smaller=3)
    prompt, following = token_ids(150, batch=2), token_ids(5, seed=5, batch=2)
    mask = torch.ones(2, 150, dtype=torch.long)
    mask[0, :40] = 0
    with kvcar.attach(model, bundle):
        expected = logits_of_steps(model, KVCarCache(bundle), prompt, following, mask)
        got = logits_of_steps(
            torch.compile(model.forward, backend="eager"), KVCarCache(bundle), prompt, following, mask
        )
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_generate_with_a_compiled_forward():
    model = tiny_model("llama", num_hidden_layers=2)
    bundle = fitted(model, times_smaller=3)
    with kvcar.attach(model, bundle):
        expected = model.generate(token_ids(150), max_new_tokens=20, do_sample=False)
        model.forward = torch.compile(model.forward, backend="eager")
        got = model.generate(token_ids(150), max_new_tokens=20, do_sample=False)
    assert got.tolist() == expected.tolist()


def test_a_full_cache_beside_it():
    model = tiny_model("llama", num_hidden_layers=2)
    bundle = fitted(model, times_smaller=3)
    prompt, following = token_ids(100), token_ids(5, seed=5)
    expected = logits_of_steps(model, DynamicCache(config=model.config), prompt, following)
    with kvcar.attach(model, bundle):
        compiled = torch.compile(model.forward, backend="eager")
        logits_of_steps(compiled, KVCarCache(bundle), prompt, following)
        got = logits_of_steps(compiled, DynamicCache(config=model.config), prompt, following)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_a_pass_over_a_cache_of_transformers_is_one_graph():
    model = tiny_model("llama", num_hidden_layers=2)
    ids = token_ids(40)
    with torch.no_grad(), kvcar.attach(model, kvcar.lossless(model)) as attached:
        compiled = torch.compile(model.forward, backend="eager", fullgraph=True)
        caches = [StaticCache(config=model.config, max_cache_len=64) for _ in range(2)]
        got, expected = (
            run(input_ids=ids, past_key_values=c).logits for run, c in zip((compiled, model), caches, strict=True)
        )
        torch.testing.assert_close(got, expected)
        # and what follows is compressed again
        own = attached.new_cache()
        torch.testing.assert_close(model(input_ids=ids, past_key_values=own).logits, expected, atol=1e-4, rtol=1e-4)
        assert own.tokens == 40


def test_attached_again():
    model = tiny_model("llama", num_hidden_layers=2)
    bundle = fitted(model, times_smaller=3)
    prompt, following = token_ids(100), token_ids(5, seed=5)
    compiled, found = torch.compile(model.forward, backend="eager"), []
    for _ in range(2):
        with kvcar.attach(model, bundle):
            found.append(logits_of_steps(compiled, KVCarCache(bundle), prompt, following))
    torch.testing.assert_close(found[0], found[1])
    with pytest.raises(AttachError, match="not attached"):
        logits_of_steps(compiled, KVCarCache(bundle), prompt, following)


def test_what_a_dead_attachment_leaves_is_refused():
    current = Current()
    handle = current.handle
    del current
    gc.collect()
    query = torch.randn(1, 2, 1, 16)
    with pytest.raises(UnsupportedModelError, match="compiled for an attachment that is gone"):
        attend_layer(query, query, query, None, 1.0, None, None, 0, handle)


def test_a_layer_that_is_passed_over_is_noticed():
    model = tiny_model("llama", num_hidden_layers=2)
    bundle = fitted(model, times_smaller=3)
    with kvcar.attach(model, bundle):
        cache = KVCarCache(bundle)
        cache.begin_pass(attachment_of(model), 1, 3, None, None)
        cache.update(torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16), 0)
        with pytest.raises(CacheStateError, match=r"layers \[1\] stored nothing"):
            cache.end_pass()
