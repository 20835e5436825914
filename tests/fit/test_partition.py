"""Cutting layers into runs: optimal, within budgets."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcar.fit.bits import allocate_bits, allocate_priced_bits, bits_at_price, error_of, price_for
from kvcar.fit.partition import Candidate, Run, RunCost, cut_into_runs, partition, run_cost


def covers(layers, longest):
    """All ways to cut ``layers`` into runs of at most ``longest``."""
    for breaks in product((False, True), repeat=layers - 1):
        runs, first = [], 0
        for place, cut in enumerate([*breaks, True], 1):
            if cut:
                runs.append(Run(first, place - first))
                first = place
        if all(run.count <= longest for run in runs):
            yield runs


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 10**6), st.floats(0, 0.1))
def test_the_cut_is_the_cheapest_of_all(layers, longest, seed, price):
    draw = torch.Generator().manual_seed(seed)
    runs = [Run(a, n) for n in range(1, longest + 1) for a in range(layers - n + 1)]
    costs = {run: RunCost(*torch.rand(2, generator=draw).mul(10).tolist()) for run in runs}
    total = lambda cut: sum(costs[r].cost + price * costs[r].flops for r in cut)  # noqa: E731
    best = min(total(cut) for cut in covers(layers, longest))
    assert total(cut_into_runs(layers, costs, price)) == pytest.approx(best)


def test_bits_at_the_price_of_a_budget_spend_about_the_budget():
    variances = [torch.rand(40, generator=torch.Generator().manual_seed(i)) * 3 for i in range(3)]
    budget = 150
    price = price_for(variances, budget)
    spent = sum(int(bits_at_price(v, price).sum()) for v in variances)
    assert abs(spent - budget) <= 2
    allocated = allocate_bits(variances, budget)
    assert sum(error_of(v, b) for v, b in zip(variances, allocated, strict=True)) == pytest.approx(
        sum(error_of(v, bits_at_price(v, price)) for v in variances), rel=0.05
    )


def correlated(layers, width, longest, own=0.3):
    """Variances of runs of a covariance in which layers share what they hold, but for ``own`` of it."""
    draw = torch.Generator().manual_seed(0)
    common = torch.randn(4000, width, generator=draw, dtype=torch.float64)
    x = torch.cat(
        [common + own * torch.randn(4000, width, generator=draw, dtype=torch.float64) for _ in range(layers)], 1
    )
    covariance = x.T @ x / len(x)
    return {
        Run(a, n): Candidate(
            torch.linalg.eigvalsh(covariance[a * width : (a + n) * width, a * width : (a + n) * width]).flip(0),
            2.0 * n * width,
        )
        for n in range(1, longest + 1)
        for a in range(layers - n + 1)
    }


def flops(cuts, side, budget):
    price = price_for([side[run].variances for cut in cuts for run in cut], budget)
    return sum(run_cost(side[run], price).flops for cut in cuts for run in cut)


def test_layers_that_share_are_joined_until_flops_run_out():
    side = correlated(layers=6, width=8, longest=6, own=1.0)
    free = partition(6, [side, side], 300, None)
    assert free == [[Run(0, 6)], [Run(0, 6)]]
    wide = flops(free, side, 300)
    tight = partition(6, [side, side], 300, wide / 2)
    assert flops(tight, side, 300) <= 1.1 * wide / 2
    assert max(run.count for cut in tight for run in cut) < 6
    assert [sum(run.count for run in cut) for cut in tight] == [6, 6]


def test_heads_apart_are_taken_where_flops_are_dear():
    together = {Run(a, 1): Candidate(torch.tensor([4.0, 0.8, 0.8, 0.8]), 8.0) for a in range(3)}
    apart = {Run(a, 1, 2): Candidate(torch.tensor([2.0, 1.2, 2.0, 1.2]), 4.0) for a in range(3)}
    side = together | apart
    assert partition(3, [side], 24, None) == [[Run(a, 1) for a in range(3)]]
    price = price_for([c.variances for c in together.values()], 24)
    cut = partition(3, [side], 24, 0.6 * sum(run_cost(c, price).flops for c in together.values()))[0]
    assert [run.parts for run in cut] == [2, 2, 2]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(30, 400), st.floats(0.05, 1.2))
def test_bits_keep_to_both_budgets(seed, budget, share):
    draw = torch.Generator().manual_seed(seed)
    variances = [torch.rand(n, generator=draw).pow(4) for n in (30, 50, 20)]
    per_latent, everything = [2.0, 1.0, 5.0], 2.0 * 30 + 50 + 5.0 * 20
    bits = allocate_priced_bits(variances, [0.0] * 3, per_latent, budget, share * everything)
    assert sum(int(b.sum()) for b in bits) <= budget
    assert sum(f * int((b > 0).sum()) for f, b in zip(per_latent, bits, strict=True)) <= share * everything
    free = allocate_bits(variances, budget)
    errors = [sum(error_of(v, b) for v, b in zip(variances, own, strict=True)) for own in (bits, free)]
    assert errors[0] >= errors[1] - 1e-9
    if share >= 1:
        assert errors[0] <= 1.05 * errors[1] + 1e-3


def test_dear_latents_get_fewer_but_more_bits():
    variances = [torch.linspace(1, 0.01, 100)]
    free = allocate_bits(variances, 250)[0]
    few = allocate_priced_bits(variances, [0.0], [1.0], 250, 60.0)[0]
    assert int((few > 0).sum()) <= 60 < int((free > 0).sum())
    assert few.max() >= free.max()
    assert int(few.sum()) > 200


def test_rows_of_the_codec_are_weighed_and_not_part_of_the_budget():
    variances = [torch.linspace(1, 0.01, 100)]
    free, priced = (allocate_priced_bits(variances, [row], [0.0], 250, None)[0] for row in (0.0, 2.0))
    assert int((priced > 0).sum()) < int((free > 0).sum()) <= 100
    assert 200 < int(priced.sum()) <= 250
    assert error_of(variances[0], priced) > error_of(variances[0], free)


def test_dear_rows_make_blocks_narrower():
    """The same candidates, with codecs shared by many tokens and by few."""
    wide, narrow = torch.tensor([6.0, 2.0, 0.8, 0.4]), torch.tensor([4.2, 0.7])
    for row, runs in ((0.0, [Run(0, 2)]), (3.0, [Run(0, 1), Run(1, 1)])):
        side = {Run(0, 2): Candidate(wide, 1.0, 2 * row), **{Run(i, 1): Candidate(narrow, 1.0, row) for i in range(2)}}
        assert partition(2, [side], 6.0, None) == [runs]


def test_latents_are_priced_only_where_bits_will_be_shared_so():
    """The wide run fits into these FLOPs with latents given up, and not with all that are worth their bits."""
    side = {
        Run(0, 2): Candidate(torch.tensor([5.4, 5.0, 2.0, 0.7, 0.1, 0.0, 0.0, 0.0]), 4.0),
        Run(0, 1): Candidate(torch.tensor([7.1, 5.8, 3.2, 1.8]), 2.0),
        Run(1, 1): Candidate(torch.tensor([1.9, 1.5, 0.2, 0.0]), 2.0),
    }
    assert partition(2, [side], 16, 10.0) == [[Run(0, 1), Run(1, 1)]]
    assert partition(2, [side], 16, 10.0, price_latents=True) == [[Run(0, 2)]]
