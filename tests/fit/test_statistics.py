"""Streaming statistics against the whole thing at once, and bases that are computed once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_model, token_ids

from kvcar.fit.statistics import SideMoments, bands_of, collect_statistics
from kvcar.geometry import Slot
from kvcar.models.geometry import read_geometry


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 70), min_size=1, max_size=6), st.integers(1, 40), st.integers(0, 2**16))
def test_pieces_give_the_same_as_the_whole(sizes, stride, seed):
    generator = torch.Generator().manual_seed(seed)
    pieces = [torch.randn(n, 6, generator=generator) * 3 + 5 for n in sizes]
    side, moments = (0, "key"), SideMoments([(0, "key")], 6, 1, 0, stride)
    for piece in pieces:
        moments.add(side, piece)
    moments.reduce()
    whole = torch.cat(pieces)
    torch.testing.assert_close(moments.mean([side]), whole.double().mean(0), atol=1e-5, rtol=1e-5)
    expected = torch.cov(whole.double().T, correction=0).reshape(6, 6)
    torch.testing.assert_close(moments.covariance([side]), expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(moments.sample([side]), whole[::stride])


def test_a_large_mean_does_not_drown_a_small_variance():
    x = (torch.randn(4000, 3, dtype=torch.float64) + 1e4).float()
    moments = SideMoments([(0, "key")], 3, 1, 0, 100)
    for piece in x.split(500):
        moments.add((0, "key"), piece)
    moments.reduce()
    expected = torch.cov(x.double().T, correction=0)
    torch.testing.assert_close(moments.covariance([(0, "key")]), expected, rtol=1e-4, atol=1e-4)


def _sides(*named):
    return tuple((int(name[0]), {"k": "key", "v": "value"}[name[1]]) for name in named)


@pytest.mark.parametrize(
    ("band", "shared", "blocks"),
    [
        (1, 0, [("0k",), ("5v",)]),
        (2, 1, [("2k", "3k"), ("3v", "5v"), ("2k", "2v")]),
        (4, 0, [("0k", "2k", "3k", "5k"), ("5k", "2k", "3k")]),
        (1, 2, [("0k", "0v", "2k", "2v"), ("3v", "5k")]),
        (4, 4, [("0k", "0v", "2k", "2v", "3k", "3v", "5k", "5v")]),
    ],
)
def test_side_moments_are_those_of_blocks(band, shared, blocks):
    draw = torch.Generator().manual_seed(0)
    everything = _sides("0k", "0v", "2k", "2v", "3k", "3v", "5k", "5v")
    moments = SideMoments(everything, 6, band, shared, stride=3)
    wanted = {_sides(*named): [] for named in blocks}
    for _ in range(5):
        x = {side: torch.randn(40, 6, generator=draw) + side[0] for side in everything}
        x[3, "key"] = x[3, "key"] + x[2, "key"]
        x[2, "value"] = x[2, "value"] - x[2, "key"]
        for side, vectors in x.items():
            moments.add(side, vectors)
        for sides, seen in wanted.items():
            seen.append(torch.cat([x[side] for side in sides], 1))
    moments.reduce()
    for sides, seen in wanted.items():
        whole = torch.cat(seen).double()
        torch.testing.assert_close(moments.mean(sides), whole.mean(0), atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(moments.covariance(sides), torch.cov(whole.T, correction=0), atol=1e-5, rtol=1e-5)
        assert torch.equal(moments.sample(sides).double(), whole[::3])


def test_side_moments_keep_only_pairs_that_may_share():
    sides = _sides("0k", "0v", "1k", "1v", "2k", "2v")
    kept = {(1, 0): 6, (2, 1): 13, (3, 0): 12, (3, 3): 21}
    for (band, shared), pairs in kept.items():
        moments = SideMoments(sides, 4, band, shared, stride=3)
        for side in sides:
            moments.add(side, torch.randn(5, 4))
        assert len(moments._outer) == pairs


def test_a_block_of_some_heads_is_a_part_of_the_whole():
    model = tiny_model("llama")
    geometry = read_geometry(model.config)
    whole = tuple(Slot(layer, head, "key") for layer in (1, 2) for head in (0, 1))
    assert bands_of(geometry, [whole]) == (2, 0)
    assert bands_of(geometry, [(Slot(0, 0, "key"), Slot(0, 0, "value"))]) == (1, 1)
    found = collect_statistics(model, geometry, token_ids(128, batch=2), (2, 0))
    some = (Slot(1, 1, "key"), Slot(2, 1, "key"))
    places = torch.cat([torch.arange(16, 32), torch.arange(48, 64)])
    assert torch.equal(found.mean(some), found.mean(whole)[places])
    assert torch.equal(found.covariance(some), found.covariance(whole)[places][:, places])
    assert torch.equal(found.variance(some), found.covariance(some).diagonal())
    assert torch.equal(found.sample(some), found.sample(whole)[:, places])
    assert found.basis(some, "std") is found.basis(some, "std")
