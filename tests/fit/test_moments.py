"""Streaming statistics against the whole thing at once."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcar.fit.moments import Moments


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 70), min_size=1, max_size=6), st.integers(1, 40), st.integers(0, 2**16))
def test_pieces_give_the_same_as_the_whole(sizes, stride, seed):
    generator = torch.Generator().manual_seed(seed)
    pieces = [torch.randn(n, 6, generator=generator) * 3 + 5 for n in sizes]
    moments = Moments(6, stride)
    for piece in pieces:
        moments.add(piece)
    whole = torch.cat(pieces)
    torch.testing.assert_close(moments.mean, whole.double().mean(0))
    torch.testing.assert_close(
        moments.covariance, torch.cov(whole.double().T, correction=0).reshape(6, 6), atol=1e-9, rtol=1e-9
    )
    assert torch.equal(moments.sample, whole[::stride])


def test_a_large_mean_does_not_drown_a_small_variance():
    x = torch.randn(4000, 3, dtype=torch.float64) * 1e-3 + 1e4
    moments = Moments(3, 100)
    for piece in x.float().split(500):
        moments.add(piece)
    expected = torch.cov(x.float().double().T, correction=0)
    torch.testing.assert_close(moments.covariance, expected, rtol=1e-9, atol=1e-15)
