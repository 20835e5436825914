"""Bits: spent to the last one, never more, and where they help most."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcar.bundle.summary import bits_by_layer, ranges, summarise_blocks
from kvcar.errors import FitError, InputError
from kvcar.fit.bits import DISTORTION, allocate_bits, bits_for, share_latents
from kvcar.fit.partition import regular_blocks
from kvcar.geometry import KVGeometry
from kvcar.plan import BitGroup, Block, Plan
from kvcar.sizes import REFERENCE_TOKENS, stored_bytes, times_smaller

GEOMETRY = KVGeometry(layers=30, kv_heads=3, query_heads=9, head_dim=64, rotary=True, max_positions=8192)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0.001, 100), min_size=1, max_size=30), st.integers(0, 300), st.integers(1, 4))
def test_the_budget_is_spent_and_never_exceeded(variances, budget, parts):
    groups = [t for t in torch.tensor(variances).chunk(parts) if len(t)]
    bits = allocate_bits(groups, budget)
    assert [len(b) for b in bits] == [len(g) for g in groups]
    flat = torch.cat(bits)
    assert flat.sum() == min(budget, 8 * len(variances))
    assert flat.min() >= 0
    assert flat.max() <= 8


@pytest.mark.parametrize("budget", range(9))
def test_no_other_spending_distorts_less(budget):
    variances = torch.tensor([5.0, 1.0, 0.3, 0.02])

    def distortion(bits):
        return sum(float(v) * DISTORTION[b] for v, b in zip(variances, bits, strict=True))

    best = min(distortion(b) for b in itertools.product(range(9), repeat=4) if sum(b) == budget)
    assert distortion(allocate_bits([variances], budget)[0].tolist()) == pytest.approx(best)


def planned(bits_total, layers_per_block, **plan):
    blocks = regular_blocks(GEOMETRY, layers_per_block, None)
    widths = [len(b) * 64 for b in blocks]
    share = [max(1, bits_total * w // sum(widths) // 4) for w in widths]
    made = tuple(
        Block(codec="linear", slots=b, groups=(BitGroup(bits=4, count=n),)) for b, n in zip(blocks, share, strict=True)
    )
    return Plan(geometry=GEOMETRY, blocks=made, **plan)


@pytest.mark.parametrize("layers_per_block", [1, 5, 30])
@pytest.mark.parametrize("target", [2.0, 3.5, 5.0, 8.0, 16.0])
def test_a_target_counts_everything(layers_per_block, target):
    empty = planned(1, layers_per_block)
    bits = bits_for(empty, target, 4)
    reached = times_smaller(planned(bits, layers_per_block), 4)
    assert target <= reached < 1.03 * target


def test_a_target_out_of_reach_is_refused_with_what_can_be_reached():
    with pytest.raises(FitError, match=r"100 times smaller is out of reach.* no more than (5\d|6\d)\.\d times"):
        bits_for(planned(1, 5), 100.0, 2)


def test_sliding_layers_count_as_what_they_keep():
    geometry = GEOMETRY.model_copy(update={"sliding_layers": (0, 1), "sliding_window": 512})
    assert geometry.full_bytes(100) == 30 * 100 * 768
    assert geometry.full_bytes(4096) == (28 * 4096 + 2 * 511) * 768
    plan = Plan(geometry=geometry)
    assert stored_bytes(plan, 4096, 2) == geometry.full_bytes(4096) + 16


@pytest.mark.parametrize(("layers", "heads"), [(0, None), (31, None), (1, 0), (1, 4)])
def test_partitions_the_model_does_not_have(layers, heads):
    with pytest.raises(InputError, match="must be 1 to"):
        regular_blocks(GEOMETRY, layers, heads)


def test_summaries():
    plan = planned(GEOMETRY.layers * 2 * 192 * 3, 5)
    rows = summarise_blocks(plan)
    assert [rows[0].layers, rows[2].layers, rows[0].kind, rows[1].kind] == ["0-4", "5-9", "key", "value"]
    assert rows[0].bits_per_element == pytest.approx(3.0, abs=0.01)
    assert all(layer.key == pytest.approx(3.0, abs=0.01) for layer in bits_by_layer(plan))
    assert bits_by_layer(Plan(geometry=GEOMETRY))[4].value == 16
    assert ranges([3, 1, 2, 7, 7]) == "1-3, 7"
    assert REFERENCE_TOKENS == 4096


def test_latents_are_shared_by_what_they_gain():
    gains = [torch.tensor([9.0, 3.0, 1.0]), torch.tensor([0.5, 0.1, 0.0]), torch.tensor([8.0, 7.0, 6.0])]
    assert share_latents(gains, 5) == (1, 1, 3)
    assert share_latents(gains, 3) == (1, 1, 1)
    assert share_latents(gains, 6) == (2, 1, 3)
    assert share_latents(gains, 9) == (3, 3, 3)
