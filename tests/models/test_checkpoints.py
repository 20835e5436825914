"""Checkpoints that cannot be loaded say so in one of kvcar's own errors, and none is loaded with weights made up."""

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvcar.errors import InputError
from kvcar.models.load import load_config, load_model

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(model_folder, tmp_path):
    return shutil.copytree(model_folder, tmp_path / "model")


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def refused(folder, *words):
    with pytest.raises(InputError) as caught:
        load_model(str(folder))
    message = str(caught.value)
    for word in words:
        assert word in message
    assert "\n" not in message
    assert len(message) < 800
    return message


def test_a_folder_as_it_was_saved_loads(folder, caplog):
    assert load_model(str(folder)).model.num_parameters() > 0
    assert caplog.text == ""


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "compressed-tensors"},
    ],
    ids=lambda q: q["quant_method"],
)
def test_quantized_checkpoints_name_what_they_are_quantized_by(folder, quantization):
    edit_config(folder, quantization_config=quantization)
    refused(folder, "cannot load the model", quantization["quant_method"])


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 5},
        {"hidden_size": 32},
        {"intermediate_size": 95},
        {"vocab_size": 100},
        {"num_key_value_heads": 4},
    ],
    ids=str,
)
def test_a_config_of_another_shape(folder, changes):
    edit_config(folder, **changes)
    refused(folder)


def test_weights_that_are_missing_are_not_made_up(folder):
    edit_weights(folder, lambda tensors: tensors.pop("model.layers.2.mlp.up_proj.weight"))
    refused(folder, "model.layers.2.mlp.up_proj.weight is missing", "copy weights and config.json")


def test_weights_that_the_config_has_no_place_for_are_told(folder, caplog):
    edit_config(folder, num_hidden_layers=3)
    with caplog.at_level(logging.WARNING, "kvcar"):
        load_model(str(folder))
    assert "has weights that its config has no place for: model.layers.3" in caplog.text


@pytest.mark.parametrize("content", [b"garbage", b"", b"PK\x03\x04garbage", b"\x80\x02garbage"], ids=repr)
def test_garbage_for_weights(folder, content):
    (folder / WEIGHTS).write_bytes(content)
    refused(folder, "its model")
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    refused(folder, "its model")


def test_a_pickle_that_runs_code_is_not_run(folder, tmp_path):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "run"), "w")

    (folder / WEIGHTS).unlink()
    torch.save({"model.embed_tokens.weight": Evil()}, folder / "pytorch_model.bin")
    refused(folder, "its model")
    assert not (tmp_path / "run").exists()


def test_a_folder_without_a_tokenizer(folder):
    for path in folder.glob("*token*"):
        path.unlink()
    message = refused(folder, "its tokenizer", "save_pretrained writes them")
    assert not message.partition(" (a model's folder")[0].endswith(":")


@pytest.mark.parametrize(
    "config",
    [
        "",
        "[]",
        "null",
        '{"model_type": 3}',
        '{"model_type": "no-such"}',
        "{}",
        "[" * 100_000,
        '{"a": ' + "9" * 5000 + "}",
    ],
)
def test_configs_that_are_none(folder, config):
    (folder / "config.json").write_text(config)
    refused(folder, "cannot load the model")
    with pytest.raises(InputError, match="cannot load the model"):
        load_config(str(folder))
