"""Codecs beside the cache: from how many tokens the two are smaller than the full cache."""

from bundles import exact, fitted
from tiny import tiny_model

from kvcar.sizes import REFERENCE_TOKENS, codecs_in_words, pays_from_tokens, stored_bytes


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
