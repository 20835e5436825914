"""A bundle belongs to a model's settings too: what its configuration says beside weights and shapes."""

import copy

import pytest
import torch
from bundles import fitted
from tiny import FAMILIES, tiny_model, token_ids
from transformers import LlamaConfig

import kvcar
from kvcar.bundle import Bundle
from kvcar.errors import ModelMismatchError
from kvcar.models.settings import differing_settings, settings_of

CHANGES = {
    "angles": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}, "rope_parameters.rope_theta: 100.0 instead of"),
    "longer angles": (
        "llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}, "rope_type: linear instead of default",
    ),
    "norms": ("llama", {"rms_norm_eps": 0.1}, "rms_norm_eps"),
    "activation": ("qwen2", {"hidden_act": "relu"}, "hidden_act: relu instead of silu"),
    "scale of queries": ("gemma3", {"query_pre_attn_scalar": 256}, "query_pre_attn_scalar"),
    "attention": ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights: False instead of True"),
}  # fmt: skip


def changed(model, changes):
    """The same weights under another configuration."""
    config = copy.deepcopy(model.config)
    for name, value in changes.items():
        setattr(config, name, value)
    other = type(model)(config).eval()
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize("lossless", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_the_same_weights_under_other_settings_are_another_model(change, lossless, tmp_path):
    family, changes, words = CHANGES[change]
    model = tiny_model(family)
    bundle = kvcar.lossless(model) if lossless else fitted(model, times_smaller=3)
    other = changed(model, changes)
    bundle.save_pretrained(tmp_path / "b")
    for each in (bundle, Bundle.from_pretrained(tmp_path / "b")):
        with pytest.raises(ModelMismatchError, match=f"configuration differs in .*{words}"):
            kvcar.attach(other, each)
    assert kvcar.lossless(other).digest != kvcar.lossless(model).digest


def test_a_model_that_was_saved_and_loaded_again_is_the_same(tmp_path):
    for family in FAMILIES:
        model = tiny_model(family)
        model.save_pretrained(tmp_path / family)
        again = type(model).from_pretrained(tmp_path / family, dtype=torch.bfloat16, attn_implementation="eager")
        assert not differing_settings(settings_of(model.config), settings_of(again.config))
        again.config.use_cache = False
        again.config.pad_token_id = 5
        with kvcar.attach(again, kvcar.lossless(model)), torch.no_grad():
            again(token_ids(8))


def test_settings_of_which_one_side_knows_nothing_do_not_count():
    assert not differing_settings({"a": 1.0}, {"b": 2.0})
    assert not differing_settings({}, settings_of(LlamaConfig()))
    assert differing_settings({"a": 1.0, "b": True}, {"a": 1.1, "b": False}) == [
        "a: 1.1 instead of 1.0",
        "b: False instead of True",
    ]
    assert not differing_settings({"a": 0.1}, {"a": 0.1 + 1e-12})
