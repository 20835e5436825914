"""Algorithm 2 finds heads that are made alike, and reuse of identical heads costs nothing."""

import math

import pytest
import torch
from bundles import SOURCE
from tiny import tiny_model, token_ids

from kvcar.cache.attach import attach
from kvcar.cache.cache import KVCarCache
from kvcar.errors import InputError
from kvcar.geometry import Slot
from kvcar.paper.algorithm2 import (
    Candidate,
    choose_reuses,
    find_candidates,
    l1_distances,
    measure_harm,
    shared_bundle,
)
from kvcar.plan import Reuse

TWIN, SCALED = Slot(2, 1, "value"), Slot(2, 0, "value")
WINDOWS = token_ids(96, batch=4, seed=1)


@pytest.fixture(scope="module")
def model():
    """Head 1 of layer 2 computes the values of head 1 of layer 1, its head 0 twice those of head 0."""
    model = tiny_model("gpt2", n_layer=4)
    blocks = model.transformer.h
    with torch.no_grad():
        # A layer that adds nothing, so that the same projection of the next one's input gives the same values.
        blocks[1].attn.c_proj.weight.zero_()
        blocks[1].mlp.c_proj.weight.zero_()
        for head, gain in ((1, 1.0), (0, 2.0)):
            columns = slice(2 * 64 + head * 16, 2 * 64 + (head + 1) * 16)
            for name in ("weight", "bias"):
                new, old = getattr(blocks[2].attn.c_attn, name), getattr(blocks[1].attn.c_attn, name)
                new[..., columns] = old[..., columns] * gain
    return model


@pytest.mark.parametrize("any_head", [False, True])
@pytest.mark.parametrize("measure", ["l1", "kl"])
def test_a_twin_is_found(model, measure, any_head):
    candidates = find_candidates(model, WINDOWS, measure, any_head)
    costs = {c.slot: c.cost for c in candidates}
    assert len(costs) == len(candidates) == 3 * 4 * 2
    # What layer 1 reads harms nothing: nothing comes of it.
    assert min((c for c in candidates if c.slot.layer > 1), key=lambda c: c.cost).slot == TWIN
    assert costs[TWIN] == pytest.approx(0, abs=1e-5)
    assert costs[SCALED] > 1e-4
    source = {c.slot: c.source for c in candidates}
    assert source[TWIN] == Slot(1, 1, "value")
    same = [c.slot.head == c.source.head for c in candidates]
    assert all(same) != any_head
    assert all(c.source.layer == c.slot.layer - 1 and c.source.kind == c.slot.kind for c in candidates)


def test_l1_is_the_mean_absolute_difference(model):
    """Against a direct computation on the values that the model hands its cache."""
    ids = token_ids(40, seed=2)
    found = l1_distances(model, ids, sinks=4)[2, "value"]
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
    lower, upper = (cache.layers[n].values[0, :, 4:] for n in (1, 2))
    for i in range(4):
        for j in range(4):
            assert float(found[i, j]) == pytest.approx(float((upper[i] - lower[j]).abs().mean()), rel=1e-5)


def test_harm_is_measured_in_any_order(model):
    windows = token_ids(64, batch=2, seed=4)
    given = [
        Candidate(SCALED, Slot(1, 0, "value"), math.nan),
        Candidate(TWIN, Slot(1, 1, "value"), math.nan),
        Candidate(Slot(3, 1, "key"), Slot(2, 1, "key"), math.nan),
        Candidate(Slot(2, 2, "key"), Slot(0, 3, "key"), math.nan),
    ]
    harm = measure_harm(model, windows, given)
    assert [c[:2] for c in harm] == [c[:2] for c in given]
    assert harm[1].cost < 1e-6
    for candidate in harm:
        assert candidate.cost == pytest.approx(measure_harm(model, windows, [candidate])[0].cost, rel=1e-3, abs=1e-6)
        assert candidate.slot == TWIN or candidate.cost > 1e-5


def test_choosing():
    given = [Candidate(Slot(n, 0, "key"), Slot(n - 1, 0, "key"), cost) for n, cost in ((1, 0.5), (2, 0.1), (3, 0.3))]
    assert [r.slot.layer for r in choose_reuses(given, count=2)] == [2, 3]
    assert [r.slot.layer for r in choose_reuses(given, threshold=0.5)] == [2, 3]
    assert choose_reuses(given, count=0) == choose_reuses(given, threshold=0.0) == ()
    for wrong in ({}, {"count": 1, "threshold": 1.0}, {"count": 4}):
        with pytest.raises(InputError):
            choose_reuses(given, **wrong)


def stepped_error(model, slot, source):
    """Largest difference of logits from the full cache, token by token through a bundle that shares one slot."""
    bundle = shared_bundle(model, "tiny", WINDOWS, SOURCE, (Reuse(slot=slot, source=source),), window=0)
    ids = token_ids(40, seed=6)
    with torch.no_grad():
        full = model(input_ids=ids).logits
        with attach(model, bundle):
            cache = KVCarCache(bundle, 0)
            stepped = [model(input_ids=ids[:, [n]], past_key_values=cache).logits for n in range(40)]
    return float((torch.cat(stepped, dim=1) - full).abs().max())


def test_a_shared_twin_changes_nothing_in_the_cache(model):
    # What is stored is stored in bfloat16.
    assert stepped_error(model, TWIN, Slot(1, 1, "value")) < 0.1 < stepped_error(model, SCALED, Slot(1, 0, "value"))


def test_nothing_to_share_makes_no_bundle(model):
    with pytest.raises(InputError, match="no slot is cheap enough"):
        shared_bundle(model, "tiny", WINDOWS, SOURCE, ())


def test_what_cannot_be_compared_is_refused(model):
    with pytest.raises(InputError, match="unknown measure 'l3'; known are: l1, kl"):
        find_candidates(model, WINDOWS, "l3")
    with pytest.raises(InputError, match="at least two layers"):
        find_candidates(tiny_model("gpt2", n_layer=1), WINDOWS)
