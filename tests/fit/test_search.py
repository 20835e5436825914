"""A searched structure on tiny models: sizes reached, blocks within limits."""

import pytest
import torch
from bundles import SOURCE
from tiny import FAMILIES, tiny_model, token_ids

import kvcar
from kvcar.cache.cache import KVCarCache
from kvcar.errors import FitError, InputError
from kvcar.fit import partition
from kvcar.fit.codecs import budget_for, solve
from kvcar.fit.fit import fit_bundles
from kvcar.fit.options import PROFILES, FitOptions, Profile, Structure
from kvcar.fit.search import empty_plan
from kvcar.fit.statistics import collect_statistics
from kvcar.plan import CacheConfig
from kvcar.sizes import times_smaller

GIVEN = {"cache": CacheConfig(32, 4, 32), "effect_tokens": 512, "times_smaller": 4.0}


def windows():
    return token_ids(256, batch=10, seed=3)


def found(model, **options):
    return next(fit_bundles(model, windows(), [FitOptions(**(GIVEN | options))], SOURCE, "tiny"))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_fits_and_runs_at_its_size(family):
    model = tiny_model(family)
    result = found(model)
    with kvcar.attach(model, result), torch.no_grad():
        cache = KVCarCache(result)
        for part in token_ids(200).split(50, 1):
            logits = model(input_ids=part, past_key_values=cache, use_cache=True).logits
    assert torch.isfinite(logits).all()
    if family != "gemma3":  # sliding layers stay exact there
        assert 4.0 <= times_smaller(result.plan, 2) < 4.4
    assert result.figures["two_pass_kl"] >= 0


@pytest.mark.parametrize("profile", PROFILES)
def test_blocks_keep_to_the_profile(profile):
    model = tiny_model("llama")
    plan = found(model, profile=profile).plan
    widest = PROFILES[profile].widest_elements
    assert all(len(b.slots) * plan.geometry.head_dim <= widest for b in plan.blocks)
    assert not plan.exact_slots
    if profile == "small":
        assert len(plan.blocks) in (1, 2), "all keys and all values, joint or separate"
    if profile == "fast":
        assert all(b.kind is not None for b in plan.blocks)


def test_keys_and_values_share_blocks_where_that_costs_less(monkeypatch):
    """Values that keys tell: one block costs less than two. Nothing in common: no more than two do."""
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.self_attn.v_proj.weight.data = 0.5 * layer.self_attn.k_proj.weight.data
    joint = found(model, profile="small")
    assert [b.kind for b in joint.plan.blocks] == [None]
    monkeypatch.setattr(partition, "_sharings", lambda *_: (partition.SEPARATE,))
    separate = found(model, profile="small")
    assert [b.kind for b in separate.plan.blocks] == ["key", "value"]
    assert joint.figures["two_pass_kl"] < 0.7 * separate.figures["two_pass_kl"]


def test_narrow_limits_cut_layers_into_groups_of_heads(monkeypatch):
    model = tiny_model("llama")
    dim = found(model).plan.geometry.head_dim
    monkeypatch.setitem(PROFILES, "fast", Profile(dim, None, ""))
    plan = found(model, profile="fast").plan
    assert all(len(b.slots) == 1 for b in plan.blocks)


def test_a_divergence_asks_for_the_smallest_cache_within_it():
    model = tiny_model("llama")
    loose, tight = (found(model, times_smaller=None, max_kl=kl) for kl in (3e-2, 5e-3))
    assert loose.figures["two_pass_kl"] <= 3e-2
    assert tight.figures["two_pass_kl"] <= 5e-3
    assert loose.figures["times_smaller"] > tight.figures["times_smaller"]
    sizes, costs = zip(*loose.figures["curve"], strict=True)
    sizes, costs = list(sizes), list(costs)
    assert sizes == sorted(sizes)
    assert costs == sorted(costs)


def test_what_cannot_be_is_refused():
    model = tiny_model("llama")
    with pytest.raises(FitError, match="out of reach"):
        found(model, times_smaller=None, max_kl=1e-12)
    with pytest.raises(FitError, match="out of reach"):
        found(model, times_smaller=500.0)
    options = [FitOptions(**GIVEN)]
    with pytest.raises(InputError, match="more text"):
        fit_bundles(model, windows()[:2], options)
    with pytest.raises(InputError, match="too short"):
        fit_bundles(model, token_ids(64, batch=20), options)
    with pytest.raises(InputError, match="must share cache"):
        fit_bundles(model, windows(), [*options, FitOptions(**(GIVEN | {"seed": 1}))])
    with pytest.raises(InputError, match="not both"):
        FitOptions(times_smaller=3, max_kl=0.1)
    with pytest.raises(InputError, match="profile must be"):
        FitOptions(profile="huge")


def test_measured_and_predicted_divergence_agree_in_size(monkeypatch):
    """The quadratic model is what bits are allocated by, so it must be about right where errors are small."""
    model, statistics = tiny_model("llama"), []

    def noting(*args):
        statistics.append(collect_statistics(*args))
        return statistics[-1]

    monkeypatch.setattr("kvcar.fit.fit.collect_statistics", noting)
    result = found(model, times_smaller=3.0, effect_tokens=2048)
    options = FitOptions(**(GIVEN | {"times_smaller": 3.0}))
    plan = empty_plan(result.plan.geometry, [block.slots for block in result.plan.blocks], options)
    budget = budget_for(plan, options, 3.0, 4)
    expected = solve(plan, statistics[0], budget, options, lambda *_: None).expected_kl
    assert 0.3 < result.figures["two_pass_kl"] / expected < 3


def test_a_profile_and_a_structure_come_from_the_same_statistics():
    model = tiny_model("llama")
    given = FitOptions(**GIVEN, structure=Structure(layers_per_block=2, metric="effect"))
    lossless = FitOptions(structure=Structure(codec="identity"))
    both = list(fit_bundles(model, windows(), [given, FitOptions(**GIVEN), lossless], SOURCE, "tiny"))
    assert [len(bundle.plan.blocks) for bundle in both] == [4, len(found(model).plan.blocks), 8]
    assert [block.lossless for block in both[2].plan.blocks] == [True] * 8
    alone = next(fit_bundles(model, windows()[:-2], [given], SOURCE, "tiny"))
    for a, b in zip(both[0].blocks, alone.blocks, strict=True):
        assert all(torch.equal(a.tensors()[name], b.tensors()[name]) for name in a.tensors())
