"""Going on from a stored context is scored as stepping two caches by hand would score it."""

import pytest
import torch
from bundles import fitted
from tiny import tiny_model, token_ids
from transformers import DynamicCache

import kvcar
from kvcar.cache.cache import KVCarCache
from kvcar.errors import InputError
from kvcar.evaluate.stored import continuation_figures, measure_continuation, time_context


@torch.no_grad()
def stepped(model, cache, ids, start, chunk):
    return torch.cat(
        [
            model(input_ids=part, past_key_values=cache, use_cache=True).logits
            for part in ids[:, start:].split(chunk, 1)
        ],
        1,
    )[0]


def test_the_following_tokens_alone_are_scored():
    model = tiny_model("llama")
    bundle = fitted(model, bits=3, layers_per_block=2)
    ids = token_ids(191, batch=2)
    with kvcar.attach(model, bundle) as attachment:
        found = measure_continuation(model, ids, 150, attachment.new_cache, prefill_chunk=50, chunk=32)
        divergences = []
        for window in ids[:, None]:
            cache, full = KVCarCache(bundle), DynamicCache(config=model.config)
            with torch.no_grad():
                for part in window[:, :150].split(50, 1):
                    for each in (cache, full):
                        model(input_ids=part, past_key_values=each, use_cache=True)
            cache.flush_window()
            q, p = (torch.log_softmax(stepped(model, c, window[:, :190], 150, 32), -1) for c in (cache, full))
            divergences.append((p.exp() * (p - q)).sum(-1).mean())
    assert found.kl_divergence.value == pytest.approx(float(torch.stack(divergences).mean()), rel=1e-4)
    assert found.window_kl_divergences == pytest.approx([float(d) for d in divergences], rel=1e-4)
    assert (found.context, found.following, found.windows) == (150, 40, 2)
    assert found.full_bytes == 150 * 512
    figures = continuation_figures(found)
    assert figures["times_smaller"] == pytest.approx(150 * 512 / figures["file_bytes"])


def test_a_lossless_cache_diverges_by_rounding_only():
    model = tiny_model("llama")
    bundle = fitted(model, codec="identity")
    with kvcar.attach(model, bundle) as attachment:
        found = measure_continuation(model, token_ids(100), 60, attachment.new_cache)
    assert found.kl_divergence.value < 1e-5
    assert found.perplexity_ratio.value == pytest.approx(1, abs=1e-3)


def test_times_of_every_repeat():
    model = tiny_model("llama")
    bundle = fitted(model, bits=3)
    with kvcar.attach(model, bundle) as attachment:
        times = time_context(model, token_ids(90), attachment.new_cache, repeats=2)
    for seconds in (times.prefill_full, times.prefill, times.save, times.load):
        assert len(seconds) == 2
        assert min(seconds) > 0


@pytest.mark.parametrize(("shape", "context"), [((1, 50), 49), ((0, 50), 10), ((1, 50), 0)])
def test_windows_that_leave_nothing_to_score_are_refused(shape, context):
    with pytest.raises(InputError, match="leave no tokens to score"):
        measure_continuation(tiny_model("llama"), torch.zeros(shape, dtype=torch.int64), context, lambda: None)
