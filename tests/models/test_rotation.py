"""How each layer rotates its keys is found from the model itself, whatever its family says."""

import logging

import pytest
import torch
from tiny import FAMILIES, tiny_model
from transformers import AutoModelForCausalLM, Cohere2Config, GlmConfig, NanoChatConfig, SmolLM3Config

from kvcar.geometry import KVGeometry
from kvcar.models.geometry import read_geometry
from kvcar.models.rotation import learn_rotations
from kvcar.models.structure import find_decoder
from kvcar.models.watching import WatchingCache

SMALL = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "initializer_range": 0.2, "bos_token_id": 1,
    "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip


def built(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def rest_after_unrotating(model):
    """By layer, the share of the keys of one repeated token that depends on the position after rotating back."""
    geometry = read_geometry(model.config)
    tables, rests = learn_rotations(model, geometry), {}
    positions = torch.arange(200)[None]

    def take(layer, keys, values):
        del values
        back = tables[layer].unrotate(keys, positions) if layer in tables else keys.float()
        rests[layer] = float((back - back.mean(2, keepdim=True)).norm() / back.norm())

    with torch.no_grad():
        find_decoder(model).decoder(
            input_ids=torch.full((1, 200), 5),
            past_key_values=WatchingCache(model.config, geometry, take, model.device),
            use_cache=True,
        )
    return rests


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_keys_of_a_repeated_token_do_not_depend_on_the_position(family, dtype):
    model = tiny_model(family, dtype=dtype)
    if not read_geometry(model.config).rotary:
        assert learn_rotations(model, read_geometry(model.config)) == {}
        return
    rests = rest_after_unrotating(model)
    assert set(rests) == set(read_geometry(model.config).codable_layers)
    assert max(rests.values()) < (1e-4 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize(
    ("config", "style", "sign", "rotating"),
    [
        (GlmConfig(**SMALL), "interleaved", 1, {0, 1, 2, 3}),
        (NanoChatConfig(**SMALL), "half", -1, {0, 1, 2, 3}),
        (SmolLM3Config(**SMALL), "half", 1, {0, 1, 2}),
        (Cohere2Config(**SMALL), "interleaved", 1, {0, 1, 2}),
    ],
    ids=["GLM: pairs beside each other", "NanoChat: backwards", "SmolLM3: one layer in four does not", "Cohere 2: full layers do not"],
)  # fmt: skip
def test_pairing_direction_and_layers_without_rotation_are_found(config, style, sign, rotating):
    model = built(config)
    tables = learn_rotations(model, read_geometry(model.config))
    assert set(tables) == rotating
    assert all(table.style == style for table in tables.values())
    assert all((table.inverse_frequency[0] > 0) == (sign > 0) for table in tables.values())
    assert max(rest_after_unrotating(model).values()) < 1e-4


def test_layers_with_the_same_rotation_share_its_tables():
    model = tiny_model("llama")
    assert len({id(table) for table in learn_rotations(model, read_geometry(model.config)).values()}) == 1


def test_keys_that_cannot_be_turned_back_are_left_as_they_are_and_logged(caplog, monkeypatch):
    model = tiny_model("llama")
    attention = model.model.layers[1].self_attn
    original, calls = attention.k_proj.forward, []

    def by_position(x):
        calls.append(x)
        return original(x) * (1 + torch.arange(x.shape[1])[None, :, None]) * len(calls)

    monkeypatch.setattr(attention.k_proj, "forward", by_position)
    with caplog.at_level(logging.WARNING, logger="kvcar.models"):
        tables = learn_rotations(model, read_geometry(model.config))
    assert set(tables) == {0, 2, 3}
    assert "keys of layer 1 depend on the position" in caplog.text


def test_a_model_in_training_is_probed_without_dropout_and_stays_in_training():
    model = tiny_model("llama", attention_dropout=0.5).train()
    assert len(learn_rotations(model, read_geometry(model.config))) == 4
    assert model.training
    assert all(module.training for module in model.modules())


def test_models_without_rotation_are_not_run():
    geometry = KVGeometry(layers=1, kv_heads=1, query_heads=1, head_dim=8, rotary=False, max_positions=8)
    assert learn_rotations(torch.nn.Identity(), geometry) == {}  # pyright: ignore[reportArgumentType]
