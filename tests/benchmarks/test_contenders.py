"""Contenders of any kind: bytes of transformers' quantised caches, what is left out and why, groups that share a pass."""

import os
import threading
import time

import contenders
import pytest
import torch
from bundles import fitted
from contenders import QUANTIZED, Contender, bundle_contender, compare, groups, noise_floor, quantized_contenders
from tiny import tiny_model, token_ids
from transformers import DynamicCache, QuantizedCache

import kvcar
from kvcar.errors import InputError
from kvcar.evaluate.fidelity import measure_fidelity, stored_bytes
from kvcar.evaluate.memory import bfloat16_bytes, kept_bytes
from kvcar.models.geometry import read_geometry

LAYERS, HEADS, DIM = 4, 2, 16
HQQ = [name for name in QUANTIZED if "hqq" in name]


def hqq_contenders(model, names=HQQ):
    return quantized_contenders(model.config, read_geometry(model.config), names)[0]


def step(model, cache, tokens):
    with torch.no_grad():
        for part in token_ids(tokens).split(64, dim=1):
            model(part, past_key_values=cache)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_full_cache_holds_what_bfloat16_takes(family):
    model = tiny_model(family)
    cache = DynamicCache(config=model.config)
    step(model, cache, 100)
    assert kept_bytes(cache) == stored_bytes(cache) == bfloat16_bytes(cache) > 0


@pytest.mark.parametrize("backend", ["quanto", "hqq"])
@pytest.mark.parametrize("bits", [4, 2])
def test_quantised_bytes_are_packed_codes_scales_and_zero_points(backend, bits):
    model = tiny_model("llama")
    cache = QuantizedCache(backend, model.config, nbits=bits, axis_key=0, axis_value=0, q_group_size=16)
    step(model, cache, 64)  # the first pass is quantised whole, and nothing is unpacked yet
    elements = 2 * LAYERS * HEADS * 64 * DIM
    assert kept_bytes(cache) == elements * bits // 8 + elements // 16 * (2 + 2)


@pytest.mark.parametrize(("tokens", "residual"), [(64, 0), (128, 64), (192, 0), (256, 64), (300, 108)])
def test_the_residual_counts_as_bfloat16(tokens, residual):
    model = tiny_model("llama")
    cache = hqq_contenders(model)[0].make()
    step(model, cache, tokens)
    coded = 2 * LAYERS * HEADS * (tokens - residual) * DIM
    assert kept_bytes(cache) == coded * 4 // 8 + coded // 16 * 4 + 2 * LAYERS * HEADS * residual * DIM * 2


def test_the_quantised_part_is_read():
    model = tiny_model("llama")
    caches = {c.name: c.make for c in hqq_contenders(model)}
    first = measure_fidelity(model, token_ids(64), caches)
    later = measure_fidelity(model, token_ids(256), caches)
    coarse, fine = later[HQQ[1]].kl_divergence.value, later[HQQ[0]].kl_divergence.value
    assert all(result.kl_divergence.value < 1e-6 for result in first.values()), "the first pass attends exactly"
    assert coarse > 5 * fine > 1e-3


def test_what_is_not_installed_is_left_out_with_a_reason(monkeypatch):
    model = tiny_model("llama")
    monkeypatch.setattr(contenders, "is_optimum_quanto_available", lambda: False)
    names = [name for name in QUANTIZED if "quanto" in name] + HQQ
    found, missing = quantized_contenders(model.config, read_geometry(model.config), names)
    assert [c.name for c in found] == HQQ
    assert set(missing) == set(names) - set(HQQ)
    assert "optimum-quanto is not installed (pip install optimum-quanto)" in missing["quanto-4bit"]
    sliding = tiny_model("gemma3")
    found, missing = quantized_contenders(sliding.config, read_geometry(sliding.config), HQQ)
    assert not found
    assert "sliding" in missing[HQQ[0]]


def test_a_backend_that_does_not_work_is_an_error_not_a_missing_row(monkeypatch):
    def broken(*args):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(QuantizedCache, "update", broken)
    with pytest.raises(InputError, match="hqq is installed but cannot quantise here: RuntimeError: no compiler"):
        hqq_contenders(tiny_model("llama"))
    with pytest.raises(InputError, match="known are: quanto-4bit"):
        hqq_contenders(tiny_model("llama"), ["nonsense"])


def test_rows_are_the_same_however_they_are_grouped():
    model = tiny_model("llama")
    floor, lossless = noise_floor(model, "tiny")
    rows = [floor, bundle_contender("3 bits", fitted(model, bits=3)), *hqq_contenders(model)]
    counted = []
    with kvcar.attach(model, lossless):
        together = list(compare(model, token_ids(200, batch=2), rows, side_by_side=9))
        apart = list(compare(model, token_ids(200, batch=2), rows, counted.append, side_by_side=3))
    assert together == apart
    assert [contender.name for contender, _ in apart] == ["identity", "3 bits", *HQQ]
    assert sum(counted) == 400 * len(groups(rows, 3)) == 800
    results = {contender.name: result for contender, result in apart}
    assert results["identity"].kl_divergence.value < 1e-6 < results["3 bits"].kl_divergence.value


def test_families_tell_bundles_of_other_kinds_apart():
    model = tiny_model("llama")
    families = {bundle_contender("x", fitted(model, bits=3, layers_per_block=n)).family for n in (1, 2)}
    assert families == {"kvcar linear", "kvcar linear, 2 layers"}
    with pytest.raises(InputError, match="multiple of the page size"):
        bundle_contender("x", fitted(model, bits=3), window=5)


def test_any_cache_of_transformers_can_be_measured():
    model = tiny_model("llama")
    contender = Contender("full again", "full", lambda: DynamicCache(config=model.config))
    [(_, result)] = list(compare(model, token_ids(150), [contender]))
    assert result.kl_divergence.value == 0.0
    assert result.times_smaller == 1.0


@pytest.fixture
def lock(tmp_path, monkeypatch):
    """The lock of another build of quanto's extension, which is not built yet."""
    cpp = pytest.importorskip("optimum.quanto.library.extensions.cpp")
    monkeypatch.setattr(cpp.ext, "_lib", None)
    monkeypatch.setattr(cpp.ext, "build_directory", str(tmp_path))
    lock = tmp_path / "lock"
    lock.touch()
    return lock


def quanto_contenders():
    model = tiny_model("llama")
    return quantized_contenders(model.config, read_geometry(model.config), ["quanto-4bit"])


def test_the_lock_of_a_killed_build_is_named_and_not_waited_for(lock):
    os.utime(lock, (0, 0))
    with pytest.raises(InputError, match=f"its lock {lock} has been there for .* delete that file"):
        quanto_contenders()
    assert lock.exists()


def test_another_build_is_waited_for_aloud_and_not_for_ever(lock, monkeypatch, capsys):
    monkeypatch.setattr(contenders, "_LOCK_SECONDS", 0.5)
    started = time.monotonic()
    with pytest.raises(InputError, match="has been there"):
        quanto_contenders()
    assert time.monotonic() - started < 30
    assert capsys.readouterr().err.count(f"(lock: {lock})") == 1


def test_a_build_that_ends_is_waited_for(tmp_path, capsys):
    lock = tmp_path / "lock"
    lock.touch()
    timer = threading.Timer(0.3, lock.unlink)
    timer.start()
    contenders._wait(contenders.FileBaton(str(lock)))
    timer.join()
    assert "waiting for another process" in capsys.readouterr().err
