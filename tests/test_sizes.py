"""Codecs beside the cache: from how many tokens the two are smaller than the full cache."""

from bundles import exact, fitted
from tiny import tiny_model

from kvcar.sizes import (
    REFERENCE_TOKENS,
    codecs_in_words,
    pays_from_tokens,
    size_in_words,
    smaller_from_tokens,
    stored_bytes,
)


def test_codecs_pay_from_the_first_token_at_which_the_saving_is_larger():
    plan = fitted(tiny_model("llama"), bits=3).plan
    length = min(REFERENCE_TOKENS, plan.geometry.max_positions)
    saved = (plan.geometry.full_bytes(length) - stored_bytes(plan, length, 2)) / length
    for codec_bytes in (1, 1000, 10**6, 10**9):
        tokens = pays_from_tokens(plan, codec_bytes)
        assert (tokens - 1) * saved <= codec_bytes < tokens * saved
        assert f"{codec_bytes:,} bytes" in codecs_in_words(plan, codec_bytes)
        assert f"{tokens:,} tokens" in codecs_in_words(plan, codec_bytes)


def test_codecs_of_a_cache_that_saves_nothing_never_pay():
    plan = exact(tiny_model("llama")).plan
    assert pays_from_tokens(plan, 1) is None
    assert "never pay" in codecs_in_words(plan, 1)


def test_small_caches_are_said_to_be_larger_until_they_are_smaller():
    plan = fitted(tiny_model("llama"), bits=3).plan
    since = smaller_from_tokens(plan)
    assert since is not None
    full = plan.geometry.full_bytes
    assert stored_bytes(plan, since, 2) < full(since)
    assert stored_bytes(plan, since - 64, 2) >= full(since - 64)
    words = size_in_words(plan, 10, stored_bytes(plan, 10, 2))
    assert words.startswith("larger than the full cache")
    assert f"smaller from about {since:,} tokens" in words
    assert "0." not in words
    assert "times smaller" in size_in_words(plan, 512, stored_bytes(plan, 512, 2))


def test_lossless_caches_never_become_smaller():
    plan = exact(tiny_model("llama")).plan
    assert smaller_from_tokens(plan, 4) is None
    words = size_in_words(plan, 512, stored_bytes(plan, 512, 4), 4)
    assert words.startswith("larger")
    assert "smaller" not in words
