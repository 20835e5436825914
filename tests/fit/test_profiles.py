"""A fit by profile on tiny models: sizes reached, blocks within limits, tuning that never makes things worse."""

import pytest
import torch
from bundles import SOURCE
from tiny import FAMILIES, tiny_model, token_ids

import kvcar
from kvcar.errors import FitError, InputError
from kvcar.fit.budget import times_smaller
from kvcar.profiles import build
from kvcar.profiles import fit as fitting
from kvcar.fit.profile_fit import fit_profile
from kvcar.fit.profiles import PROFILES, Profile, ProfileOptions
from kvcar.cache.cache import KVCarCache

GIVEN = {"page_tokens": 32, "window": 32, "effect_tokens": 512, "tune_steps": 0, "times_smaller": 4.0}


def windows():
    return token_ids(256, batch=10, seed=3)


def found(model, **options):
    return fit_profile(model, "tiny", windows(), SOURCE, ProfileOptions(**(GIVEN | options)))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_fits_and_runs_at_its_size(family):
    model = tiny_model(family)
    result = found(model)
    with kvcar.attach(model, result.bundle), torch.no_grad():
        cache = KVCarCache(result.bundle)
        for part in token_ids(200).split(50, 1):
            logits = model(input_ids=part, past_key_values=cache, use_cache=True).logits
    assert torch.isfinite(logits).all()
    if family != "gemma3":  # sliding layers stay exact there
        assert 4.0 <= times_smaller(result.bundle.plan, 4) < 4.4
    assert result.held_kl >= 0


@pytest.mark.parametrize("profile", PROFILES)
def test_blocks_keep_to_the_profile(profile):
    model = tiny_model("llama")
    plan = found(model, profile=profile).bundle.plan
    widest = PROFILES[profile].widest_elements
    assert all(len(b.slots) * plan.geometry.head_dim <= widest for b in plan.blocks)
    assert not plan.exact_slots
    if profile == "small":
        assert len(plan.blocks) in (1, 2), "all keys and all values, together or apart"
    if profile == "fast":
        assert all(b.kind is not None for b in plan.blocks)


def test_keys_and_values_share_blocks_where_that_costs_less(monkeypatch):
    """Values that keys tell: one block costs less than two. Nothing in common: no more than two do."""
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.self_attn.v_proj.weight.data = 0.5 * layer.self_attn.k_proj.weight.data
    together = found(model, profile="small")
    assert [b.kind for b in together.bundle.plan.blocks] == [None]
    monkeypatch.setattr(build, "_sharings", lambda *_: (build._APART,))
    apart = found(model, profile="small")
    assert [b.kind for b in apart.bundle.plan.blocks] == ["key", "value"]
    assert together.held_kl < 0.7 * apart.held_kl


def test_narrow_limits_cut_layers_into_groups_of_heads(monkeypatch):
    model = tiny_model("llama")
    dim = found(model).bundle.plan.geometry.head_dim
    monkeypatch.setitem(PROFILES, "fast", Profile(dim, None, ""))
    plan = found(model, profile="fast").bundle.plan
    assert all(len(b.slots) == 1 for b in plan.blocks)


def test_tuning_never_ends_worse():
    model = tiny_model("llama")
    spoiled = found(model, times_smaller=6.0, tune_steps=4, tune_rate=1.0)
    assert spoiled.tuned_kl <= spoiled.held_kl
    assert len([e for e in spoiled.history if "loss" in e]) == 2, "it ends at the first validation that is no better"


def test_a_divergence_asks_for_the_smallest_cache_within_it():
    model = tiny_model("llama")
    loose, tight = (found(model, times_smaller=None, max_kl=kl) for kl in (3e-2, 5e-3))
    assert loose.held_kl <= 3e-2
    assert tight.held_kl <= 5e-3
    assert loose.times_smaller > tight.times_smaller
    sizes = [point.times_smaller for point in loose.curve]
    costs = [point.predicted_kl for point in loose.curve]
    assert sizes == sorted(sizes)
    assert costs == sorted(costs)


def test_what_cannot_be_is_refused():
    model = tiny_model("llama")
    with pytest.raises(FitError, match="out of reach"):
        found(model, times_smaller=None, max_kl=1e-12)
    with pytest.raises(FitError, match="out of reach"):
        found(model, times_smaller=500.0)
    with pytest.raises(InputError, match="more text"):
        fit_profile(model, "tiny", windows()[:2], SOURCE, ProfileOptions(**GIVEN))
    with pytest.raises(InputError, match="too short"):
        fit_profile(model, "tiny", token_ids(64, batch=20), SOURCE, ProfileOptions(**GIVEN))
    with pytest.raises(InputError, match="not both"):
        ProfileOptions(times_smaller=3, max_kl=0.1)
    with pytest.raises(InputError, match="profile must be"):
        ProfileOptions(profile="huge")


def test_measured_and_predicted_divergence_agree_in_size():
    """The quadratic model is what bits are allocated by, so it must be about right where errors are small."""
    model = tiny_model("llama")
    statistics = []
    keep = fitting.collect_statistics

    def noting(*args):
        statistics.append(keep(*args))
        return statistics[-1]

    fitting.collect_statistics = noting
    try:
        result = found(model, times_smaller=3.0, effect_tokens=2048)
    finally:
        fitting.collect_statistics = keep
    predicted = fitting.solve(
        statistics[0], result.bundle.plan, PROFILES["balanced"], 3.0, 4, lambda *_: None
    ).predicted_kl
    assert 0.3 < result.held_kl / predicted < 3
