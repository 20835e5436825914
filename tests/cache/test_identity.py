"""A cache that stores everything unchanged must change nothing, for every family."""

import pytest
import torch
from bundles import exact, fitted
from tiny import FAMILIES, tiny_model, token_ids
from transformers import DynamicCache

import kvcar
from kvcar.cache.cache import KVCarCache

PROMPT, STEPS = 150, 64


@torch.no_grad()
def greedy_logits(model, cache, ids, steps=STEPS, chunk=64):
    """Logits of a chunked prefill and of greedy steps after it, and the tokens taken."""
    logits, tokens = [], []
    for start in range(0, ids.shape[1], chunk):
        logits.append(model(input_ids=ids[:, start : start + chunk], past_key_values=cache, use_cache=True).logits)
    for _ in range(steps):
        tokens.append(logits[-1][:, -1].argmax(-1, keepdim=True))
        logits.append(model(input_ids=tokens[-1], past_key_values=cache, use_cache=True).logits)
    return torch.cat(logits, 1), torch.cat(tokens, 1)


@torch.no_grad()
def forced_logits(model, cache, ids, chunk=64, prefill=PROMPT):
    """Logits of given tokens: a chunked prefill, then one token at a time."""
    parts = [ids[:, s : min(s + chunk, prefill)] for s in range(0, prefill, chunk)]
    parts += list(ids[:, prefill:].split(1, dim=1))
    return torch.cat([model(input_ids=p, past_key_values=cache, use_cache=True).logits for p in parts], 1)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_exact_slots_give_the_same_bits(family, implementation):
    model = tiny_model(family)
    model.set_attn_implementation(implementation)
    ids = token_ids(PROMPT)
    expected, tokens = greedy_logits(model, DynamicCache(config=model.config), ids)
    bundle = exact(model)
    with kvcar.attach(model, bundle):
        got, got_tokens = greedy_logits(model, KVCarCache(bundle), ids)
    assert torch.equal(got, expected)
    assert torch.equal(got_tokens, tokens)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_identity_pages_err_no_more_than_twice_what_plain_attention_errs(family, dtype):
    """Sinks, pages and window really are used; only the order of sums differs from the model's own attention."""
    reference = tiny_model(family, dtype=torch.float64)
    model = tiny_model(family, dtype=dtype)
    # Same weights in both: the reference takes those of the model under test.
    reference.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
    ids = token_ids(PROMPT + STEPS)
    expected = forced_logits(reference, DynamicCache(config=reference.config), ids)
    plain = forced_logits(model, DynamicCache(config=model.config), ids)
    bundle = fitted(model, codec="identity")
    with kvcar.attach(model, bundle):
        cache = KVCarCache(bundle)
        got = forced_logits(model, cache, ids)
    assert cache.stored_bytes_by_part()["pages"] > 0
    plain_error, error = (plain - expected).abs(), (got - expected).abs()
    assert error.max() <= 2 * plain_error.max()
    assert error.mean() <= 2 * plain_error.mean()


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_through_identity_pages_is_the_models_own(family):
    model = tiny_model(family)
    ids = token_ids(PROMPT)
    expected = model.generate(ids, max_new_tokens=STEPS, do_sample=False)
    with kvcar.attach(model, fitted(model, codec="identity")):
        got = model.generate(ids, max_new_tokens=STEPS, do_sample=False)
    assert torch.equal(got, expected)
