"""The soak itself: that it runs, and that it would notice."""

import json

import pytest
import torch
from soak import Mismatch, Soak, requests, threads


def test_random_operations_hold_what_transformers_hold_and_every_kind_comes_up():
    soak = Soak(seed=1)
    soak.run(lambda: sum(soak.done.values()) >= 120, every=1000)
    kinds = "new step chunk crop reorder repeat select fork flush store reset interrupt threads generate drop"
    assert soak.done.keys() >= set(kinds.split())
    assert all(host.worst < host.tolerance for host in soak.hosts)


def test_a_cache_that_holds_something_else_is_noticed():
    soak = Soak(seed=2)
    soak.run(lambda: sum(soak.done.values()) >= 8, every=1000)
    slot = next(slot for slot in soak.slots if slot.cache.tokens and slot.tokens < 400)
    layer = next(layer for layer in slot.cache._coded.values() if layer.buffers is not None)
    layer.buffers[1].add_(5)
    with pytest.raises(Mismatch, match="logits differ"):
        slot.host.step(slot, 1, 0)


def test_requests_and_threads_are_recorded(tmp_path):
    requests(count=20, warm_up=4, output=tmp_path)
    threads(rounds=1, runs=3, workers=3, output=tmp_path)
    found = [json.loads((tmp_path / f"soak-{name}.json").read_text()) for name in ("requests", "threads")]
    assert len(found[0]["resident_bytes"]) == 11
    assert found[1]["right"] == [3]
    assert torch.get_num_threads() == 1
