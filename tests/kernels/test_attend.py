"""Tiled attention against the specification, over every structure a plan can have."""

import math

import pytest
import torch
from structures import STRUCTURES, paged_past, rotary

from kvcar.cache.coder import PageCoder
from kvcar.kernels.attend import ExactPast, naive, tiled
from kvcar.kernels.attend.tiled import attend


@pytest.fixture(scope="module", params=list(STRUCTURES), ids=str)
def coder(request):
    return PageCoder(STRUCTURES[request.param](), torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("with_rotary", [True, False], ids=["rotary", "no positions"])
@pytest.mark.parametrize(("tokens", "count"), [(1, 1), (33, 1), (63, 7), (1000, 1), (1000, 40)])
@pytest.mark.parametrize("layer", [0, 1])
def test_tiled_is_the_specification(coder, layer, tokens, count, with_rotary):
    paged = paged_past(coder, layer, tokens, 2, rotary() if with_rotary else None, [0, min(9, tokens - 1)])
    query = torch.randn(2, 4, count, 16)
    mask = torch.ones(count, 5 + count, dtype=torch.bool).tril(5)[None, None].expand(2, -1, -1, -1)
    exact = ExactPast(torch.randn(2, 2, 5 + count, 16), torch.randn(2, 2, 5 + count, 16), mask)
    for softcap in (None, 5.0):
        expected = naive.attend(query, exact, paged, 0.25, softcap)
        torch.testing.assert_close(attend(query, exact, paged, 0.25, softcap), expected, atol=2e-5, rtol=2e-5)
    sinks = torch.linspace(-2, 3, query.shape[1])
    expected = naive.attend(query, exact, paged, 0.25, None, sinks)
    assert not torch.allclose(expected, naive.attend(query, exact, paged, 0.25), atol=1e-5)
    torch.testing.assert_close(attend(query, exact, paged, 0.25, None, sinks), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_without_pages_it_is_ordinary_attention(dtype):
    query, keys, values = torch.randn(1, 4, 3, 16), torch.randn(1, 2, 9, 16), torch.randn(1, 2, 9, 16)
    query, keys, values = (x.to(dtype) for x in (query, keys, values))
    mask = torch.ones(3, 9, dtype=torch.bool).tril(6)[None, None]
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.double(), keys.double(), values.double(), attn_mask=mask, enable_gqa=True
    )
    plain = torch.nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=True)
    got = attend(query, ExactPast(keys, values, mask), None, 1 / math.sqrt(16))
    assert got.dtype == dtype
    assert (got - expected).abs().max() <= 2 * (plain - expected).abs().max() + 1e-7


def test_a_query_that_sees_nothing_gives_zeros_not_nan():
    keys = torch.randn(1, 2, 3, 16)
    nothing = ExactPast(keys, keys, torch.zeros(1, 1, 2, 3, dtype=torch.bool))
    for implementation in (naive.attend, attend):
        assert torch.equal(implementation(torch.randn(1, 4, 2, 16), nothing, None, 1.0), torch.zeros(1, 4, 2, 16))


def test_unfilled_room_is_never_read(coder):
    paged = paged_past(coder, 0, 40, 1, rotary(), [0])
    query = torch.randn(1, 4, 1, 16)
    exact = ExactPast(torch.randn(1, 2, 1, 16), torch.randn(1, 2, 1, 16), None)
    before = attend(query, exact, paged, 0.25)
    for arena in paged.tiles:
        arena[:, 2:] = 255  # 40 tokens fill one page and part of the second
    assert torch.equal(attend(query, exact, paged, 0.25), before)


@pytest.mark.parametrize("rows", [1, 100, 5000])
def test_tiles_cover_every_token_once(coder, rows):
    for tokens in (1, 32, 513, 5000):
        paged = paged_past(coder, 0, tokens, 1, None, [0])
        starts, counts = [], []
        for start, pages, count in tiled._tiles(paged, tiled.tile_tokens(rows, fuse=False)):
            assert sum(p.shape[1] for p in pages) * 32 >= count > 0
            starts.append(start)
            counts.append(count)
        assert starts == [sum(counts[:i]) for i in range(len(counts))]
        assert sum(counts) == tokens


@pytest.mark.parametrize("with_rotary", [True, False], ids=["rotary", "no positions"])
def test_the_fused_tile_is_what_scores_give(coder, with_rotary, monkeypatch):
    paged = paged_past(coder, 1, 1500, 2, rotary() if with_rotary else None, [0, 40])
    query = torch.randn(2, 4, 64, 16)
    exact = ExactPast(torch.randn(2, 2, 5, 16), torch.randn(2, 2, 5, 16), None)
    monkeypatch.setattr(tiled, "_LONGEST_TILE", 512)
    tiles = []
    fused_tile = tiled._attend_tile
    monkeypatch.setattr(tiled, "_attend_tile", lambda *given: tiles.append(given[3]) or fused_tile(*given))
    got = attend(query, exact, paged, 0.25)
    assert bool(tiles) == (with_rotary or coder.units[0].coded.codec is None or not folded(coder, query))
    torch.testing.assert_close(got, naive.attend(query, exact, paged, 0.25), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("pages", [True, False], ids=["pages", "no pages"])
def test_fused_rows_that_see_nothing_are_zero_and_others_are_right(coder, pages):
    """PyTorch's operation calls the log-sum-exp of such a row 0, as if it had seen something."""
    paged = paged_past(coder, 1, 40, 2, rotary(), [0, 39]) if pages else None  # of the second sequence, nothing is seen
    query, mask = torch.randn(2, 4, 64, 16), torch.rand(2, 1, 64, 9) < 0.5
    mask[0, :, 3:9], mask[1, :, 20:30] = False, False
    exact = ExactPast(torch.randn(2, 2, 9, 16), torch.randn(2, 2, 9, 16), mask)
    got = attend(query, exact, paged, 0.25)
    torch.testing.assert_close(got, naive.attend(query, exact, paged, 0.25), atol=2e-5, rtol=2e-5)
    assert not got[1, :, 20:30].any()
    assert got[0, :, 3:9].any() == pages


def folded(coder, query):
    """Whether any keys of layer 1 are folded into the queries."""
    rows = query.reshape(2, 2, -1, 16)
    return any(tiled._sums_latents(rows, reader) for reader in coder.readers(1, "key"))


@pytest.mark.parametrize("pages", [True, False], ids=["pages", "no pages"])
@pytest.mark.parametrize("kind", ["causal", "past hidden", "padded", "a window"])
@pytest.mark.parametrize(("before", "tokens"), [(0, 130), (70, 130), (70, 127)])
def test_what_sees_itself_causally_is_attended_as_such_and_all_else_as_it_is_hidden(
    coder, before, tokens, kind, pages, monkeypatch
):
    causal = []
    attend_causal = tiled._attend_causal
    monkeypatch.setattr(tiled, "_attend_causal", lambda *given: causal.append(1) or attend_causal(*given))
    mask = torch.ones(2, 1, tokens, before + tokens, dtype=torch.bool).tril(before)
    if kind == "past hidden":
        mask[1, :, :, : before // 2] = False
    elif kind == "padded":
        mask[1, ..., : before + 3] = False
    elif kind == "a window":
        mask &= torch.ones_like(mask).triu(before - 60)
    query, keys, values = torch.randn(2, 4, tokens, 16), *torch.randn(2, 2, 2, before + tokens, 16)
    exact = ExactPast(keys, values, mask)
    paged = paged_past(coder, 0, 96, 2, rotary(), [0, 5]) if pages else None
    for _ in range(2):  # a second layer
        got = attend(query, exact, paged, 0.25)
        torch.testing.assert_close(got, naive.attend(query, exact, paged, 0.25), atol=2e-5, rtol=2e-5)
    assert len(causal) == (2 if tokens >= 128 and kind in ("causal", "past hidden") else 0)


def test_nothing_is_known_of_a_mask_that_is_gone():
    query, keys = torch.randn(1, 2, 128, 16), torch.randn(1, 2, 131, 16)
    mask = torch.ones(1, 1, 128, 131, dtype=torch.bool).tril(3)
    known = len(tiled._KNOWN)
    attend(query, ExactPast(keys, keys, mask), None, 0.25)
    assert len(tiled._KNOWN) == known + 1
    del mask
    assert len(tiled._KNOWN) == known
