"""Similarity finds heads that are made alike, and reuse of identical heads costs nothing."""

import pytest
import torch
from tiny import tiny_model, token_ids

from kvcar.errors import InputError
from kvcar.paper.similarity import measure_similarity
from kvcar.paper.reuse import MEASURES, Candidate, choose_reuses
from kvcar.geometry import Slot
from kvcar.paper.harm import measure_harm

TWIN, SCALED = Slot(2, 1, "value"), Slot(3, 0, "value")


@pytest.fixture(scope="module")
def model():
    """Head 1 of layer 2 computes the values of head 1 of layer 1; head 0 of layer 3 twice those of layer 2."""
    model = tiny_model("gpt2", n_layer=4)
    blocks = model.transformer.h
    with torch.no_grad():
        # Layers that add nothing, so that the same projection of the same input gives the same values.
        for block in (blocks[1], blocks[2]):
            block.attn.c_proj.weight.zero_()
            block.mlp.c_proj.weight.zero_()
        for upper, lower, head, gain in ((2, 1, 1, 1.0), (3, 2, 0, 2.0)):
            columns = slice(2 * 64 + head * 16, 2 * 64 + (head + 1) * 16)
            for name in ("weight", "bias"):
                new, old = getattr(blocks[upper].attn.c_attn, name), getattr(blocks[lower].attn.c_attn, name)
                new[..., columns] = old[..., columns] * gain
    return model


@pytest.fixture(scope="module")
def similarity(model):
    return measure_similarity(model, token_ids(96, batch=4, seed=1))


@pytest.mark.parametrize("measure", MEASURES)
def test_a_twin_is_found(similarity, measure):
    best = min(similarity.candidates(measure, any_head=True), key=lambda c: c.cost)
    if measure in ("l1", "relative_l1"):
        assert best.slot == TWIN
    assert best.slot in (TWIN, SCALED)
    assert best.cost == pytest.approx(0, abs=1e-5)
    costs = {c.slot: c.cost for c in similarity.candidates(measure)}
    # What ignores scale does not tell twice from once; L1 does.
    assert (costs[SCALED] < 1e-5) == (measure in ("cosine", "cka", "prediction"))
    assert len(costs) == 3 * 4 * 2


def test_l1_is_the_mean_absolute_difference(model):
    """Against a direct computation on the values that the model hands its cache."""
    ids = token_ids(40, seed=2)
    found = measure_similarity(model, ids, sinks=4).distances["l1"][2, "value"]
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
    lower, upper = (cache.layers[n].values[0, :, 4:] for n in (1, 2))
    for i in range(4):
        for j in range(4):
            assert float(found[i, j]) == pytest.approx(float((upper[i] - lower[j]).abs().mean()), rel=1e-5)


def test_reusing_a_twin_does_no_harm(model):
    windows = token_ids(64, batch=2, seed=4)
    scaled_from = Slot(2, 0, "value")
    other = Candidate(Slot(3, 1, "key"), Slot(2, 1, "key"), 0)
    given = [Candidate(SCALED, scaled_from, 0), Candidate(TWIN, Slot(1, 1, "value"), 0), other]
    harm = measure_harm(model, windows, given)
    assert [c.slot for c in harm] == [c.slot for c in given]
    assert harm[1].cost < 1e-6
    assert harm[0].cost > 1e-4
    assert harm[2].cost > 1e-5


def test_choosing():
    given = [Candidate(Slot(n, 0, "key"), Slot(n - 1, 0, "key"), cost) for n, cost in ((1, 0.5), (2, 0.1), (3, 0.3))]
    assert [r.slot.layer for r in choose_reuses(given, count=2)] == [2, 3]
    assert [r.slot.layer for r in choose_reuses(given, threshold=0.5)] == [2, 3]
    assert [r.slot.layer for r in choose_reuses(given, count=1, dissimilar=True)] == [1]
    for wrong in ({}, {"count": 1, "threshold": 1.0}, {"count": 4}):
        with pytest.raises(InputError):
            choose_reuses(given, **wrong)
