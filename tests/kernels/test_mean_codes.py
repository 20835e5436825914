"""What the errors of a page's tokens have in common, in 2 bits an element."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvcar.kernels.page_means import PageMeans, pack_means, unpack_means
from kvcar.layout import MeansLayout


@given(st.integers(1, 70), st.integers(0, 2**31))
def test_what_is_read_is_the_nearest_of_four_steps(width, seed):
    means = torch.randn(2, 3, width, generator=torch.Generator().manual_seed(seed)) * 0.3
    data = pack_means(means)
    assert data.shape == (2, 3, MeansLayout(0, width).size)
    step = means.square().mean(-1, keepdim=True).sqrt().half().float()
    levels = torch.tensor([-1.5, -0.5, 0.5, 1.5]) * step[..., None]
    best = (levels - means[..., None]).abs().amin(-1)
    assert torch.allclose((unpack_means(data, width) - means).abs(), best, atol=1e-5)


def test_the_mean_is_most_of_what_is_common():
    means = torch.randn(50, 512)
    left = means - unpack_means(pack_means(means), 512)
    assert float(left.square().mean()) < 0.13


@pytest.mark.parametrize("value", [0.0, 1e-9, 1e9])
def test_sizes_that_float16_does_not_hold_stay_finite(value):
    read = unpack_means(pack_means(torch.full((1, 8), value)), 8)
    assert torch.isfinite(read).all()
    assert bool((read == 0).all()) == (value < 1e-3)


def test_no_bytes_read_as_no_mean():
    assert bool((unpack_means(torch.zeros(1, 18, dtype=torch.uint8), 64) == 0).all())


def test_columns_are_read_where_they_lie():
    means, layout = torch.randn(1, 2, 24), MeansLayout(40, 24)
    pages = torch.zeros(1, 2, 64, dtype=torch.uint8)
    pages[..., layout.offset : layout.end] = pack_means(means)
    scale = torch.rand(6) + 0.5
    own = PageMeans(layout, torch.tensor([20, 3, 4, 5, 9, 0]), scale)
    expected = unpack_means(pack_means(means), 24)[..., own.columns] * scale
    assert torch.equal(own.of([pages[:, :1], pages[:, 1:]]), expected)
