"""Entropy coding of single pages: codes come back, in few bytes, and the bytes never change."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcar.context.entropy import encode_codes
from kvcar.errors import ContextError, InputError
from kvcar.serve.page_codes import decode_page, encode_page, parameter_bytes

GOLDEN = "be93e92398e99833802df4cff3dd2c53371cd9b7b929ebd98f197077ed796f09"


def gaussian_codes(tokens, bits, seed=0, loud=0.0):
    rng = np.random.default_rng(seed)
    half = 2 ** (np.array(bits) - 1)
    x = rng.standard_normal((tokens, len(bits))) * half / 3 * np.exp(loud * rng.standard_normal((tokens, 1)))
    return np.clip(np.round(x) + half, 0, 2 * half - 1).astype(np.uint8)


def taken(codes, bits):
    parameters, data = encode_page(codes, bits)
    assert len(parameters) == parameter_bytes(len(bits))
    assert np.array_equal(decode_page(parameters, data, len(codes), bits), codes)
    return len(parameters) + len(data)


@pytest.mark.parametrize("tokens", [1, 7, 63, 64, 65, 256])
@pytest.mark.parametrize("bits", [[1], [8, 5, 3, 3, 1], [2] * 65, list(range(8, 0, -1)) * 20], ids=len)
def test_codes_come_back(tokens, bits):
    taken(gaussian_codes(tokens, bits), bits)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_codes_come_back(data):
    bits = data.draw(st.lists(st.integers(1, 8), min_size=1, max_size=70))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    top, kind = 2 ** np.array(bits) - 1, data.draw(st.sampled_from(["uniform", "constant", "ends"]))
    codes = rng.integers(0, top + 1, (data.draw(st.integers(1, 140)), len(bits)))
    if kind != "uniform":
        codes = np.where(codes > top // 2, top, 0) if kind == "ends" else codes[:1].repeat(len(codes), 0)
    taken(codes.astype(np.uint8), bits)


def test_a_page_takes_no_more_than_a_coder_that_learns():
    bits = [8] * 16 + [5] * 100 + [4] * 150 + [2] * 150
    for loud in (0.0, 0.6):
        codes = gaussian_codes(256, bits, loud=loud)
        assert taken(codes, bits) < 1.06 * len(encode_codes(codes, bits))


def test_loud_tokens_cost_less_where_loudness_is_known():
    bits = [4] * 400
    codes = gaussian_codes(256, bits, loud=0.6)
    shuffled = codes.copy()
    for column in shuffled.T:
        np.random.default_rng(int(column[0])).shuffle(column)
    assert taken(codes, bits) < 0.97 * taken(shuffled, bits)


def test_the_bytes_never_change():
    """A record written today must be readable for ever: a change here needs a new version of the format."""
    bits = [8, 6, 6, 4, 3, 2, 1, 1] * 10
    index = np.arange(200)[:, None] * np.arange(3, 83) + np.arange(80)
    codes = (index * index // 17 % (2 ** np.array(bits))).astype(np.uint8)
    parameters, data = encode_page(codes, bits)
    assert hashlib.sha256(parameters.tobytes() + data).hexdigest() == GOLDEN


def test_what_bits_cannot_hold_is_refused():
    for codes in (np.array([[4]], np.uint8), np.zeros((3, 2), np.uint8), np.zeros((0, 1), np.uint8)):
        with pytest.raises(InputError, match="do not fit"):
            encode_page(codes, [2])


def test_bytes_and_parameters_that_no_codes_give_are_refused():
    bits = [5] * 40
    parameters, data = encode_page(gaussian_codes(200, bits), bits)
    with pytest.raises(ContextError, match="words of 4 bytes"):
        decode_page(parameters, data[:-1], 200, bits)
    with pytest.raises(ContextError, match="parameters"):
        decode_page(parameters[:-1], data, 200, bits)
    with pytest.raises(ContextError, match=r"cannot be decoded|do not hold"):
        decode_page(parameters, b"\xff" * len(data), 200, bits)
    for place, value in ((0, 100), (8, 100), (48, 5), (88, 48), (88, 255)):
        changed = parameters.copy()
        changed[place] = value
        with pytest.raises(ContextError, match="no page has"):
            decode_page(changed, data, 200, bits)
