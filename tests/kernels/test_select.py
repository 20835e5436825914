"""Summaries of pages and the choice by them, against definitions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcar.kernels.select import SUMMARIES, choose_pages


def summarised(name, keys, first=0):
    """Summaries of ``keys`` ``[B, H, P, N, D]``, of which the first tokens are hidden."""
    pages, tokens = keys.shape[2:4]
    visible = (torch.arange(pages * tokens) >= first).view(1, 1, pages, tokens, 1)
    return SUMMARIES[name]().summarise(keys, visible)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), spread=st.floats(0.0, 10.0), first=st.integers(0, 11))
def test_bounds_are_above_every_score(seed, spread, first):
    generator = torch.Generator().manual_seed(seed)
    keys = spread * torch.randn(2, 3, 4, 4, 8, generator=generator) + torch.randn(8, generator=generator)
    query = torch.randn(2, 3, 5, 8, generator=generator)
    bound = SUMMARIES["bounds"]().scores(query, summarised("bounds", keys, first))
    scores = torch.einsum("bhqd,bhpnd->bhqpn", query, keys)
    visible = torch.arange(16).view(4, 4) >= first
    highest = scores.masked_fill(~visible, -torch.inf).amax(-1)
    assert (bound[..., first // 4 :] >= highest[..., first // 4 :] - 1e-4).all()


@pytest.mark.parametrize("name", list(SUMMARIES))
def test_summaries_see_visible_tokens_alone(name):
    keys = torch.randn(1, 2, 4, 8, 16)
    changed = keys.clone()
    changed[:, :, 0] = 100.0
    changed[:, :, 1, :3] = -100.0
    a, b = summarised(name, keys, 11), summarised(name, changed, 11)
    assert torch.equal(a, b)
    assert a.shape == (1, 2, 4, SUMMARIES[name].vectors * 16)
    assert (a[:, :, 0] == 0).all(), "nothing of the first page is visible"


@pytest.mark.parametrize("name", list(SUMMARIES))
def test_equal_keys_are_scored_exactly(name):
    """Where a page's keys are all the same, every summary says what attention would."""
    keys = torch.randn(1, 2, 5, 1, 16).expand(-1, -1, -1, 8, -1)
    query = torch.randn(1, 2, 3, 16)
    expected = query @ keys[:, :, :, 0].transpose(2, 3)
    got = SUMMARIES[name]().scores(query, summarised(name, keys))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("most", [1, 3])
@pytest.mark.parametrize("name", list(SUMMARIES))
def test_a_page_that_holds_all_the_mass_is_chosen(name, most, heads):
    keys = torch.randn(2, heads, 9, 32, 16)
    query = torch.randn(2, 2 * heads, 1, 16)
    direction = query[:, ::2, 0]
    keys[0, :, 6] += 3 * direction[0, :, None]
    keys[1, :, 2, 5:] += 3 * direction[1, :, None]
    hidden = torch.tensor([0, 0])
    chosen = choose_pages(query, summarised(name, keys), SUMMARIES[name](), 1.0, most, hidden, with_next=False)
    assert chosen.shape == (2, most)
    assert chosen.dtype == torch.int64
    assert 6 in chosen[0]
    assert 2 in chosen[1]
    assert (chosen.diff() > 0).all(), "ascending"


def test_hidden_pages_come_last_and_the_partly_filled_one_always():
    keys, query = torch.randn(2, 2, 5, 32, 16), torch.randn(2, 4, 2, 16)
    held, summary = summarised("mean", keys), SUMMARIES["mean"]()
    chosen = choose_pages(query, held, summary, 1.0, 4, torch.tensor([3, 0]), with_next=True)
    assert set(chosen[0].tolist()) >= {3, 4, 5}
    assert chosen[1, -1] == 5
    alone = choose_pages(query[:1], held[:1, :, 3:], summary, 1.0, 2, torch.tensor([0]), with_next=False)
    assert alone.tolist() == [[0, 1]]
    assert choose_pages(query, held, summary, 1.0, 1, torch.tensor([3, 0]), with_next=True).tolist() == [[5], [5]]


def test_every_head_has_one_vote():
    """A head with huge scores does not outvote the others."""
    keys = torch.zeros(1, 3, 3, 4, 8)
    query = torch.zeros(1, 3, 1, 8)
    keys[:, 0, 0, :, 0], query[:, 0, :, 0] = 1.0, 100.0
    keys[:, 1:, 2, :, 0], query[:, 1:, :, 0] = 1.0, 10.0
    chosen = choose_pages(query, summarised("mean", keys), SUMMARIES["mean"](), 1.0, 1, torch.tensor([0]), False)
    assert chosen.tolist() == [[2]]
