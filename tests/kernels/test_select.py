"""Summaries of pages and the choice by them, against definitions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcar.errors import KernelError
from kvcar.kernels.select import SUMMARIES, choose_pages, cpu, naive


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


@pytest.mark.parametrize("backend", ["naive", "cpu"])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("most", [1, 3])
@pytest.mark.parametrize("name", list(SUMMARIES))
def test_a_page_that_holds_all_the_mass_is_chosen(name, most, heads, backend):
    keys = torch.randn(2, heads, 9, 32, 16)
    query = torch.randn(2, 2 * heads, 1, 16)
    direction = query[:, ::2, 0]
    keys[0, :, 6] += 3 * direction[0, :, None]
    keys[1, :, 2, 5:] += 3 * direction[1, :, None]
    hidden = torch.tensor([0, 0])
    held = summarised(name, keys).half()
    chosen = choose_pages(query, held, SUMMARIES[name](), 1.0, most, hidden, with_next=False, backend=backend)
    assert chosen.shape == (2, most)
    assert chosen.dtype == torch.int64
    assert 6 in chosen[0]
    assert 2 in chosen[1]
    assert (chosen.diff() > 0).all(), "ascending"


@pytest.mark.parametrize("backend", ["naive", "cpu"])
def test_hidden_pages_come_last_and_the_partly_filled_one_always(backend):
    keys, query = torch.randn(2, 2, 5, 32, 16), torch.randn(2, 4, 2, 16)
    held, summary = summarised("mean", keys).half(), SUMMARIES["mean"]()

    def chosen(query, held, most, hidden, with_next):
        return choose_pages(query, held, summary, 1.0, most, torch.tensor(hidden), with_next, backend)

    four = chosen(query, held, 4, [3, 0], with_next=True)
    assert set(four[0].tolist()) >= {3, 4, 5}
    assert four[1, -1] == 5
    assert chosen(query[:1], held[:1, :, 3:], 2, [0], with_next=False).tolist() == [[0, 1]]
    assert chosen(query, held, 1, [3, 0], with_next=True).tolist() == [[5], [5]]
    assert chosen(query[:1], held[:1], 3, [9], with_next=False).diff().gt(0).all(), "all pages are hidden"


@pytest.mark.parametrize("with_next", [False, True])
@pytest.mark.parametrize("most", [1, 2, 17, 60])
@pytest.mark.parametrize(("dim", "tokens", "spread"), [(4, 1, 1.0), (12, 3, 1e-6), (16, 1, 1.0), (64, 16, 0.1)])
def test_the_c_kernel_is_the_specification(dim, tokens, spread, most, with_next):
    """Of summaries in part of a larger buffer; numbers below the smallest normal one of float16 count too."""
    query, buffer = torch.randn(3, 6, tokens, dim), (spread * torch.randn(3, 2, 80, dim)).half()
    query = query.transpose(1, 2).contiguous().transpose(1, 2)  # as models hand them over
    held, hidden = buffer[:, :, :63], torch.tensor([0, 2, 3])
    given = (query, held, SUMMARIES["midrange"](), 1 / spread, most, hidden, with_next)
    assert torch.equal(cpu.choose_pages(*given), naive.choose_pages(*given))
    assert torch.equal(choose_pages(*given, backend="cpu"), naive.choose_pages(*given))


def test_the_c_kernel_takes_the_first_of_equal_pages_and_stays_in_bounds():
    query, held = torch.randn(1, 2, 1, 16), torch.zeros(1, 2, 40, 16, dtype=torch.float16)
    summary, hidden = SUMMARIES["mean"](), torch.tensor([3])
    assert cpu.choose_pages(query, held, summary, 1.0, 4, hidden, False).tolist() == [[3, 4, 5, 6]]
    assert cpu.choose_pages(query, held, summary, 1.0, 39, hidden, False).tolist() == [[0, 1, *range(3, 40)]]
    for bad in (float("nan"), float("inf")):
        got = cpu.choose_pages(query * bad, held, summary, 1.0, 4, hidden, True)
        assert got[0, :3].ge(3).all(), "a query of no numbers has no say"
        assert got.diff().gt(0).all()
        assert got[0, 3] == 40


def test_the_c_kernel_refuses_what_it_does_not_serve():
    query, hidden = torch.randn(1, 2, 1, 16), torch.tensor([0])
    half = torch.zeros(1, 2, 5, 16).half()
    with pytest.raises(KernelError, match="no products"):
        cpu.choose_pages(query, torch.cat([half, half], -1), SUMMARIES["range"](), 1.0, 2, hidden, False)
    with pytest.raises(KernelError, match="float32"):
        cpu.choose_pages(query, half.float(), SUMMARIES["mean"](), 1.0, 2, hidden, False)
    for most, with_next in ((6, False), (7, True), (0, True)):
        with pytest.raises(KernelError, match=f"cannot choose {most}"):
            cpu.choose_pages(query, half, SUMMARIES["mean"](), 1.0, most, hidden, with_next)


def test_every_head_has_one_vote():
    """A head with huge scores does not outvote the others."""
    keys = torch.zeros(1, 3, 3, 4, 8)
    query = torch.zeros(1, 3, 1, 8)
    keys[:, 0, 0, :, 0], query[:, 0, :, 0] = 1.0, 100.0
    keys[:, 1:, 2, :, 0], query[:, 1:, :, 0] = 1.0, 10.0
    chosen = choose_pages(query, summarised("mean", keys), SUMMARIES["mean"](), 1.0, 1, torch.tensor([0]), False)
    assert chosen.tolist() == [[2]]
