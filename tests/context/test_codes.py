"""Codes come back as they were, in about as many bits as their entropy, and bit by bit as the format says."""

import hashlib
import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcar.context.entropy import (
    FIXED,
    code_probabilities,
    decode_codes,
    encode_codes,
    entropy_bits_per_token,
    runs,
)
from kvcar.errors import ContextError, InputError

GOLDEN = "d9878f007c1f1a162eae2bac8ac01a395f03565f85087fccb898d817c1808026"


def gaussian_codes(tokens, bits, seed=0, loud=0.0):
    """Codes of normal latents, a step of about half a deviation; ``loud`` is the deviation of a token's log scale."""
    rng = np.random.default_rng(seed)
    half = 2 ** (np.array(bits) - 1)
    scale = np.exp(loud * rng.standard_normal((tokens, 1)))
    x = np.round(rng.standard_normal((tokens, len(bits))) * scale * half / 3)
    return np.clip(x + half, 0, 2 * half - 1).astype(np.uint8)


@pytest.mark.parametrize("tokens", [1, 7, 63, 64, 65, 200, 1000])
@pytest.mark.parametrize("bits", [[1], [8, 5, 3, 3, 1], [2] * 65, list(range(8, 0, -1)) * 20], ids=len)
def test_codes_come_back(tokens, bits):
    codes = gaussian_codes(tokens, bits)
    assert np.array_equal(decode_codes(encode_codes(codes, bits), tokens, bits), codes)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_codes_come_back(data):
    bits = data.draw(st.lists(st.integers(1, 8), min_size=1, max_size=6))
    tokens = data.draw(st.integers(1, 140))
    seed = data.draw(st.integers(0, 2**32 - 1))
    kind = data.draw(st.sampled_from(["uniform", "constant", "ends"]))
    rng, top = np.random.default_rng(seed), 2 ** np.array(bits) - 1
    codes = rng.integers(0, top + 1, (tokens, len(bits)))
    if kind != "uniform":
        codes = np.where(codes > top // 2, top, 0) if kind == "ends" else codes[:1].repeat(tokens, 0)
    codes = codes.astype(np.uint8)
    assert np.array_equal(decode_codes(encode_codes(codes, bits), tokens, bits), codes)


def test_nothing_to_code():
    assert decode_codes(encode_codes(np.zeros((0, 3), np.uint8), [2, 2, 1]), 0, [2, 2, 1]).shape == (0, 3)


@pytest.mark.parametrize(("tokens", "most"), [(4096, 1.01), (512, 1.06)])
def test_bits_are_close_to_the_entropy(tokens, most):
    bits = [6] * 10 + [4] * 60 + [3] * 60
    codes = gaussian_codes(tokens, bits)
    entropy = entropy_bits_per_token(torch.from_numpy(codes))
    assert 0.99 * entropy < 8 * len(encode_codes(codes, bits)) / tokens < most * entropy


def test_tokens_that_are_loud_throughout_cost_less_than_the_entropy_of_latents():
    bits = [4] * 400
    codes = gaussian_codes(2048, bits, loud=0.6)
    assert 8 * len(encode_codes(codes, bits)) / 2048 < 0.97 * entropy_bits_per_token(torch.from_numpy(codes))


def test_latents_that_never_change_cost_almost_nothing():
    codes = np.full((4096, 100), 3, dtype=np.uint8)
    assert len(encode_codes(codes, [3] * 100)) < 4096 * 100 * 0.02 / 8


def test_the_bytes_never_change():
    """A file written today must be readable for ever: a change here needs a new version of the context format."""
    bits = [8, 6, 6, 4, 3, 2, 1, 1]
    index = np.arange(300)[:, None] * np.array([37, 11, 5, 7, 3, 2, 1, 1]) + np.arange(8)
    codes = (index * index // 17 % (2 ** np.array(bits))).astype(np.uint8)
    assert hashlib.sha256(encode_codes(codes, bits)).hexdigest() == GOLDEN


def test_codes_that_bits_cannot_hold_are_refused():
    with pytest.raises(InputError, match="do not fit"):
        encode_codes(np.array([[4]], dtype=np.uint8), [2])
    with pytest.raises(InputError, match="do not fit"):
        encode_codes(np.zeros((3, 2), dtype=np.uint8), [2])


def test_bytes_that_no_codes_give_are_refused():
    data = encode_codes(gaussian_codes(300, [5] * 40), [5] * 40)
    with pytest.raises(ContextError, match="words of 4 bytes"):
        decode_codes(data[:-1], 300, [5] * 40)
    with pytest.raises(ContextError, match="cannot be decoded"):
        decode_codes(bytes([255]) * len(data), 300, [5] * 40)


def test_without_the_library_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "constriction", None)
    with pytest.raises(InputError, match=r"kvcar\[store\]"):
        encode_codes(np.zeros((1, 1), np.uint8), [1])


@pytest.mark.parametrize("tokens", [1, 64, 65, 1000, 4096])
def test_runs_cover_all_tokens_and_grow(tokens):
    found = list(runs(tokens))
    assert [start for start, _ in found] == [0, *(stop for _, stop in found[:-1])]
    assert found[-1][1] == tokens
    assert len(found) < 16


@pytest.mark.parametrize("levels", [2, 4, 32, 256])
def test_the_prior_is_a_distribution_of_the_wanted_width(levels):
    centre = np.array([4 * (levels // 2), 2 * (levels - 1)])
    deviation = np.array([[FIXED // 20, FIXED, FIXED * levels // 16]] * 2)
    p = code_probabilities(levels, centre, deviation)
    assert p.shape == (2, 3, levels)
    assert (p >= 0).all()
    np.testing.assert_allclose(p.sum(-1), 1, atol=1e-12)
    if levels == 256:
        found = (p * np.abs(np.arange(levels) - centre[:, None, None] / 4)).sum(-1)
        np.testing.assert_allclose(found[0], deviation[0] / FIXED, rtol=0.06)


def test_entropy_of_known_distributions():
    uniform = torch.arange(64)[:, None].repeat(1, 3) % torch.tensor([2, 8, 1])
    assert entropy_bits_per_token(uniform) == pytest.approx(4.0)
    skewed = torch.tensor([[0], [0], [0], [1]])
    assert entropy_bits_per_token(skewed) == pytest.approx(0.75 * math.log2(4 / 3) + 0.5)
    many = torch.randint(0, 200, (100, 1300), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    apart = sum(entropy_bits_per_token(many[:, i : i + 1]) for i in range(1300))
    assert entropy_bits_per_token(many) == pytest.approx(apart)
    assert entropy_bits_per_token(torch.zeros(5, 0, dtype=torch.int64)) == 0


@pytest.mark.parametrize("codes", [torch.zeros(3), torch.zeros(0, 3, dtype=torch.int64), torch.zeros(2, 2)], ids=str)
def test_what_is_no_codes_is_refused(codes):
    with pytest.raises(InputError, match="codes must be integers"):
        entropy_bits_per_token(codes)
    with pytest.raises(InputError, match="start at 0"):
        entropy_bits_per_token(torch.tensor([[-1]]))
