"""Measuring decode steps that attend to a few pages: against the same thing done by hand."""

import pytest
import torch
from bundles import fitted
from tiny import tiny_model, token_ids
from transformers import DynamicCache

import kvcar
from kvcar.errors import InputError
from kvcar.evaluate.attended import attended_figures, measure_attended
from kvcar.runtime.cache import KVCarCache


def test_figures_are_those_of_stepping_each_cache_alone():
    model = tiny_model("llama")
    bundle = fitted(model, bits=3)
    windows = token_ids(300, batch=2, seed=3)
    with kvcar.attach(model, bundle), torch.no_grad():
        found = measure_attended(model, bundle, windows, [2, 50], following=12, prefill_chunk=100)
        log = {}
        for name, cache in (
            ("full", lambda: DynamicCache(config=model.config)),
            (None, lambda: KVCarCache(bundle)),
            (2, lambda: KVCarCache(bundle, attend_pages=2)),
        ):
            parts = []
            for window in windows:
                own = cache()
                for part in (*window[:287].split(100), *window[287:-1].split(1)):
                    logits = model(part[None], past_key_values=own).logits[0]
                    parts += [logits] if len(part) == 1 else []
            log[name] = torch.cat(parts).double().log_softmax(-1)
    for pages in (None, 2):
        divergence = (log["full"].exp() * (log["full"] - log[pages])).sum(-1).mean()
        assert found[pages].kl_divergence.value == pytest.approx(float(divergence), rel=1e-3)
    from_all = (log[None].exp() * (log[None] - log[2])).sum(-1).mean()
    assert found[2].kl_divergence_from_all.value == pytest.approx(float(from_all), rel=1e-3)
    assert found[2].pages == 8
    assert found[50].kl_divergence == found[None].kl_divergence
    assert found[50].kl_divergence_from_all.value == 0.0
    assert found[50].stored_bytes > found[None].stored_bytes
    figures = attended_figures(found[2])
    assert figures["attend_pages"] == 2
    assert figures["times_smaller"] == found[2].full_bytes / found[2].stored_bytes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"following": 99}, "leave no context"),
        ({"following": 9, "step_tokens": 17}, "attend to all"),
        ({"following": 9, "page_counts": [0]}, "at least 1 page"),
    ],
)
def test_what_cannot_be_measured_is_refused(options, message):
    model = tiny_model("llama")
    bundle = fitted(model, bits=3)
    with kvcar.attach(model, bundle), pytest.raises(InputError, match=message):
        measure_attended(model, bundle, token_ids(100), **({"page_counts": [2]} | options))
