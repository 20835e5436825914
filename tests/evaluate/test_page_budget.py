"""Sharing out pages among layers by what limiting each of them costs."""

from itertools import pairwise

import pytest
import torch
from bundles import fitted
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_model, token_ids

import kvcar
from kvcar.errors import InputError
from kvcar.evaluate.page_budget import FEWEST_PAGES, measure_page_budget, share_pages
from kvcar.runtime.cache import KVCarCache


@given(costs=st.lists(st.floats(0, 10), min_size=1, max_size=40), average=st.integers(2, 60), more=st.integers(0, 60))
def test_shares_have_the_average_and_stay_within_what_there_is(costs, average, more):
    pages = share_pages(costs, average, average + more)
    assert sum(pages) == average * len(costs)
    assert min(pages) >= FEWEST_PAGES
    assert max(pages) <= average + more
    ranked = [p for _, p in sorted(zip(costs, pages, strict=True))]
    assert all(a <= b + 1 for a, b in pairwise(ranked)), "who costs more gets more"


def test_shares_go_by_a_power_of_the_cost():
    assert share_pages([1.0, 1.0, 1.0], 7, 99) == [7, 7, 7]
    assert share_pages([1.0, 2.0**2.5], 30, 99) == [20, 40]
    assert share_pages([1.0, 2.0**2.5], 30, 35) == [25, 35]


def test_the_costs_are_those_of_caches_with_few_pages_in_some_layers():
    model = tiny_model("llama")
    bundle, windows = fitted(model, bits=3), token_ids(300, batch=2, seed=3)
    with kvcar.attach(model, bundle), torch.no_grad():
        found = measure_page_budget(model, bundle, windows, 2, following=12, layers_at_once=3, prefill_chunk=100)

        def log_probabilities(pages):
            parts = []
            for window in windows:
                cache = KVCarCache(bundle, attend_pages=pages)
                for part in (*window[:287].split(100), *window[287:-1].split(1)):
                    logits = model(part[None], past_key_values=cache).logits[0]
                    parts += [logits] if len(part) == 1 else []
            return torch.cat(parts).double().log_softmax(-1)

        everything = log_probabilities(None)
        for group, cost in zip(found.groups, found.costs, strict=True):
            limited = log_probabilities([2 if layer in group else 99 for layer in range(4)])
            divergence = (everything.exp() * (everything - limited)).sum(-1).mean()
            assert cost.value == pytest.approx(float(divergence), rel=1e-3)
    assert found.groups == ((0, 1, 2), (3,))
    assert found.pages == tuple(share_pages([c.value for c in found.costs for _ in range(3)][:4], 2, found.held_pages))


@pytest.mark.parametrize("options", [{"average": 1}, {"average": 8}, {"average": 4, "following": 299}], ids=str)
def test_what_leaves_nothing_to_share_is_refused(options):
    model = tiny_model("llama")
    bundle = fitted(model, bits=3)
    with kvcar.attach(model, bundle), pytest.raises(InputError, match="to share out"):
        measure_page_budget(model, bundle, token_ids(300), **({"following": 10} | options))


def test_another_window_leaves_other_pages_to_share():
    model = tiny_model("llama")
    bundle = fitted(model, bits=3)
    own, page = bundle.plan.window, bundle.plan.page_tokens
    assert own > 0
    with kvcar.attach(model, bundle):
        for window, held in ((None, (300 - own) // page), (0, 300 // page)):
            found = measure_page_budget(model, bundle, token_ids(300), 2, following=4, window=window, prefill_chunk=100)
            assert found.held_pages == held
