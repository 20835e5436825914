"""Tuning weights to shared heads: the model adapts, its bundle follows, the original is refused afterwards."""

import copy
from dataclasses import replace

import pytest
import torch
from bundles import SOURCE, by_hand
from test_algorithm1 import MANY, QUICK, WINDOWS
from tiny import tiny_model, token_ids

from kvcar.cache.attach import attach
from kvcar.cache.cache import KVCarCache
from kvcar.errors import InputError, ModelMismatchError
from kvcar.geometry import Slot
from kvcar.paper.finetune import finetune_weights
from kvcar.paper.options import TrainOptions
from kvcar.plan import Reuse

REUSES = (
    Reuse(slot=Slot(2, 0, "value"), source=Slot(1, 0, "value")),
    Reuse(slot=Slot(3, 1, "key"), source=Slot(2, 1, "key")),
)


def nll(model, bundle):
    """Of the original's own continuation, stepped through the cache."""
    ids = token_ids(64, seed=11)
    with attach(model, bundle), torch.no_grad():
        cache, logits = KVCarCache(bundle, 0), []
        for token in ids[0]:
            logits.append(model(input_ids=token.view(1, 1), past_key_values=cache).logits[0])
    return torch.cat(logits)


@pytest.mark.parametrize("objective", ["kl", "ce"])
def test_it_brings_the_compressed_model_nearer(objective):
    model = tiny_model("llama")
    original = copy.deepcopy(model)
    bundle = by_hand(model, [], reuses=REUSES, window=0, exact_dtype="model")
    options = TrainOptions(
        objective=objective,
        joint_steps=40,
        learning_rate=1e-3,
        windows_per_step=8,
        l1_weight=0.01 if objective == "kl" else 0,
    )
    result = finetune_weights(model, bundle, MANY, SOURCE, options)
    losses = [e["validation_loss"] for e in result.history if "validation_loss" in e]
    assert min(losses) < losses[0]
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, dict(original.named_parameters())[n])}
    assert changed
    assert all("k_proj" in name or "v_proj" in name for name in changed)
    with pytest.raises(ModelMismatchError):
        attach(original, result.bundle)
    with torch.no_grad():
        full = original(input_ids=token_ids(64, seed=11)).logits[0]
    if objective == "kl":
        before = torch.nn.functional.mse_loss(nll(original, bundle), full)
        assert torch.nn.functional.mse_loss(nll(model, result.bundle), full) < before


def test_attention_of_a_model_with_fused_projections():
    model = tiny_model("gpt2")
    bundle = by_hand(model, [], reuses=REUSES, window=0)
    before = model.transformer.h[0].attn.c_attn.weight.clone()
    finetune_weights(
        model, bundle, WINDOWS, SOURCE, replace(QUICK, learning_rate=1e-3, joint_steps=4), tuned="attention"
    )
    assert torch.equal(before, model.transformer.h[0].attn.c_attn.weight)
    assert model.transformer.h[0].attn.c_attn.weight.requires_grad


def test_a_model_in_16_bits_is_refused():
    model = tiny_model("llama", dtype=torch.bfloat16)
    bundle = by_hand(model, [], reuses=REUSES)
    with pytest.raises(InputError, match="float32"):
        finetune_weights(model, bundle, WINDOWS, SOURCE, QUICK)
