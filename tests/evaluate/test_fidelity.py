"""Measurements: the full cache against itself, bytes against tensors, figures against their definitions."""

import math

import pytest
import torch
from bundles import by_hand, exact, fitted
from tiny import FAMILIES, tiny_model, token_ids
from transformers import DynamicCache

import kvcar
from kvcar.cache.cache import KVCarCache
from kvcar.errors import InputError
from kvcar.evaluate.fidelity import mean_of, measure_fidelity, ratio_of
from kvcar.geometry import Slot
from kvcar.models.geometry import read_geometry
from kvcar.sizes import compressed_size, full_size, parse_bytes, stored_bytes, what_fits


def test_an_exact_plan_has_no_divergence_at_all():
    model = tiny_model("llama")
    bundle = exact(model)
    with kvcar.attach(model, bundle):
        result = measure_fidelity(model, token_ids(200, batch=2), {"x": lambda: KVCarCache(bundle)})["x"]
    assert result.kl_divergence.value == 0.0
    assert result.same_top.value == 1.0
    assert result.perplexity == result.perplexity_full
    assert result.tokens == 2 * 199


def test_figures_are_what_their_names_say():
    """Against a computation of its own: both caches stepped by hand, figures from their logits."""
    model = tiny_model("llama")
    bundle = fitted(model, bits=2)
    windows = token_ids(160, batch=2, seed=3)
    with kvcar.attach(model, bundle):
        result = measure_fidelity(model, windows, {"x": lambda: KVCarCache(bundle)}, chunk=64)["x"]
        log_p, log_q = [], []
        for window in windows:
            for cache, sink in ((DynamicCache(config=model.config), log_p), (KVCarCache(bundle), log_q)):
                with torch.no_grad():
                    parts = [model(p[None], past_key_values=cache).logits[0] for p in window.split(64)]
                sink.append(torch.cat(parts)[:-1].double().log_softmax(-1))
    p, q, targets = torch.stack(log_p), torch.stack(log_q), windows[:, 1:]
    nll = -q.gather(2, targets[..., None]).flatten()
    assert result.perplexity.value == pytest.approx(float(nll.mean().exp()), rel=1e-5)
    assert result.perplexity.stderr == pytest.approx(float(nll.mean().exp() * nll.std() / math.sqrt(318)), rel=1e-4)
    divergence = (p.exp() * (p - q)).sum(-1)
    assert result.kl_divergence.value == pytest.approx(float(divergence.mean()), rel=1e-4)
    assert result.kl_divergence.value > 1e-3
    assert result.window_kl_divergences == pytest.approx(divergence.mean(1).tolist(), rel=1e-4)
    assert result.same_top.value == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))


def test_coarser_codes_diverge_more():
    model = tiny_model("llama")
    bundles = {bits: fitted(model, bits=float(bits)) for bits in (1, 3, 6)}
    with kvcar.attach(model, bundles[1]):
        caches = {str(k): (lambda b=b: KVCarCache(b)) for k, b in bundles.items()}
        results = measure_fidelity(model, token_ids(300), caches)
    divergences = [results[str(bits)].kl_divergence.value for bits in (1, 3, 6)]
    assert divergences == sorted(divergences, reverse=True)
    assert divergences[2] < 0.02 * divergences[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_are_those_of_the_tensors(family):
    model = tiny_model(family)
    bundle = fitted(model, bits=3)
    for window in (0, 32, 128):
        with kvcar.attach(model, bundle), torch.no_grad():  # anew each time: tables of angles stay grown
            cache = KVCarCache(bundle, window)
            seen = 0
            for count in (1, 30, 33, 1, 64, 64, 7, 183, 117):
                model(token_ids(count, batch=2), past_key_values=cache)
                seen += count
                counted = _all_tensor_bytes(cache)
                assert cache.stored_bytes() == counted == stored_bytes(cache.plan, seen, 4, batch=2), (window, seen)
                assert sum(cache.stored_bytes_by_part().values()) == counted


def _all_tensor_bytes(cache):
    """Bytes of every tensor reachable from the cache's own state, found without asking its accounting."""
    found = {}
    tables = [cache._host.rotary(layer) for layer in cache.plan.coded_layers] if cache._pages.tokens else []
    holders = [
        cache._pages.arenas,
        [vars(layer) for layer in cache.layers],
        vars(cache._state),
        [vars(t) for t in tables if t],
    ]

    def walk(x):
        if isinstance(x, torch.Tensor):
            found[x.data_ptr(), x.shape] = x.nbytes
        elif isinstance(x, dict):
            for name, value in x.items():
                # Frequencies belong to the model; transformers keeps the sliding window's size in a tensor.
                if name not in ("inverse_frequency", "_sliding_window_tensor"):
                    walk(value)
        elif isinstance(x, list | tuple):
            for value in x:
                walk(value)

    walk(holders)
    return sum(found.values())


def test_partly_coded_layers_are_counted_too():
    model = tiny_model("llama")
    bundle = by_hand(model, [tuple(Slot(1, h, "key") for h in (0, 1))], bits=8)
    with kvcar.attach(model, bundle), torch.no_grad():
        cache = KVCarCache(bundle)
        for part in token_ids(300).split(64, dim=1):
            model(part, past_key_values=cache)
    assert cache.stored_bytes() == stored_bytes(cache.plan, 300, 4)


def test_full_bytes_are_the_models_own_in_bfloat16():
    for family in FAMILIES:
        model = tiny_model(family)
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(token_ids(100), past_key_values=cache)
        elements = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
        assert read_geometry(model.config).full_bytes(100) == 2 * elements


def test_standard_errors():
    x = torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=torch.float64)
    assert mean_of(x).value == 3.0
    assert mean_of(x).stderr == pytest.approx(float(x.std()) / 2)
    assert math.isnan(mean_of(x[:1]).stderr)
    ratio = ratio_of(x + 0.5, x)
    assert ratio.value == pytest.approx(math.exp(0.5))
    assert ratio.stderr == pytest.approx(0.0, abs=1e-12), "a constant difference has no error, however noisy the text"


def test_windows_that_cannot_be_scored():
    model = tiny_model("llama")
    for ids in (
        torch.zeros(0, 5, dtype=torch.int64),
        torch.zeros(2, 1, dtype=torch.int64),
        torch.zeros(5, dtype=torch.int64),
    ):
        with pytest.raises(InputError, match="at least 2 tokens"):
            measure_fidelity(model, ids, {})


def test_what_fits_is_the_most_that_fits():
    model = tiny_model("llama")
    plan = fitted(model, times_smaller=4).plan
    geometry = plan.geometry
    for of in (full_size(geometry), compressed_size(plan, 4)):
        for memory in (10_000, 100_000, 5_000_000):
            fits = what_fits(of, memory, batch=2, tokens=300, max_positions=512)
            assert fits.longest_tokens == 0 or of(fits.longest_tokens, 2) <= memory
            assert fits.longest_tokens == 512 or of(fits.longest_tokens + 64, 2) > memory
            assert fits.largest_batch == 0 or of(300, fits.largest_batch) <= memory
            assert of(300, fits.largest_batch + 1) > memory
            assert fits.cut_by_positions == (fits.longest_tokens == 512)


def test_amounts_of_memory():
    assert parse_bytes("24GiB") == 24 * 2**30
    assert parse_bytes("1.5 MiB") == 3 * 2**19
    assert parse_bytes("80GB") == 80 * 10**9
    assert parse_bytes("1000") == 1000
    for wrong in ("", "GiB", "-1GiB", "12 parsecs", "0", "nan", "inf"):
        with pytest.raises(InputError, match="no amount of memory"):
            parse_bytes(wrong)
