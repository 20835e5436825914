"""Models whose layers lie on several devices, as ``device_map="auto"`` lays them: the cache lies on the first one's."""

import pytest
import torch
from bundles import fitted
from commands import words, words_tokenizer
from pretend_devices import FIRST, SECOND, on_one_device, over_two_devices, pretend_devices, put, where
from stepped import logits
from tiny import tiny_model, token_ids
from tiny_families import tiny_family
from transformers import DynamicCache

import kvcar
from kvcar.evaluate.layers import block_costs
from kvcar.fit.samples import sample_windows
from kvcar.serve.record_coder import RecordCoder
from kvcar.serve.record_file import RecordKey
from kvcar.serve.records import encode_record

FAMILIES = ("llama", "gpt2", "gemma3", "qwen3")
SIZES = (50, 50, 50)


def spread(family, seed=0, devices=(FIRST, SECOND)):
    model = tiny_model(family, seed=seed)
    return over_two_devices(model, model.transformer.h if family == "gpt2" else model.model.layers, devices)


def here(tensor):
    return put(tensor.view_as(tensor), torch.device("cpu"))


def test_tensors_of_two_devices_do_not_meet():
    with pretend_devices():
        first, second = torch.ones(2, device=FIRST), torch.ones(2, device=SECOND)
        assert second.device == SECOND
        assert (second + 1).device == SECOND
        with pytest.raises(RuntimeError, match="tensors on"):
            first + second
        assert (first + second.to(FIRST)).device == FIRST


@pytest.mark.parametrize("family", FAMILIES)
def test_two_devices_say_what_one_says(family):
    ids, single = token_ids(150, batch=2), tiny_model(family)
    with kvcar.attach(single, kvcar.lossless(single)) as attached:
        expected = logits(single, ids, attached.new_cache(), SIZES)
        longer = single.generate(ids[:1, :90], max_new_tokens=8, do_sample=False)
    with pretend_devices():
        model = spread(family)
        with kvcar.attach(model, kvcar.lossless(model)) as attached:
            cache = attached.new_cache()
            got = logits(model, put(ids.clone(), FIRST), cache, SIZES)
            generated = model.generate(put(ids[:1, :90].clone(), FIRST), max_new_tokens=8, do_sample=False)
    assert cache.pages > 0
    assert where(got) == FIRST
    torch.testing.assert_close(here(got), expected, atol=2e-5, rtol=1e-5)
    assert torch.equal(here(generated), longer)


def test_the_first_layers_may_be_elsewhere_than_the_embeddings():
    ids, single = token_ids(150, batch=2), tiny_model("llama")
    expected = logits(single, ids, DynamicCache(config=single.config), SIZES)
    with pretend_devices():
        model = spread("llama", devices=(SECOND, FIRST))
        with kvcar.attach(model, kvcar.lossless(model)) as attached:
            got = logits(model, put(ids.clone(), FIRST), attached.new_cache(), SIZES)
    torch.testing.assert_close(here(got), expected, atol=2e-5, rtol=1e-5)


def test_layers_that_read_the_keys_of_others_may_be_elsewhere_than_these():
    """Gemma 4: its last two layers read the keys of the two before them, one of them sliding, one full."""
    ids, single = token_ids(150), tiny_family("gemma4_text")
    expected = logits(single, ids, DynamicCache(config=single.config), SIZES)
    with pretend_devices(), torch.no_grad():
        model = tiny_family("gemma4_text")
        over_two_devices(model, model.model.layers, 3 * (FIRST, SECOND))
        with kvcar.attach(model, kvcar.lossless(model)) as attached:
            cache, x = attached.new_cache(), put(ids.clone(), FIRST)
            got = here(logits(model, x, cache, (50, 50)))
            last = here(model(input_ids=x[:, 100:], past_key_values=cache, logits_to_keep=2).logits)
    torch.testing.assert_close(torch.cat([got, last], 1), expected[:, [*range(100), -2, -1]], atol=1e-4, rtol=1e-4)


def test_sequences_are_chosen_on_all_devices():
    ids = token_ids(100, batch=3)
    single = tiny_model("gemma3")
    expected = logits(single, ids, DynamicCache(config=single.config), (50, 50))
    with pretend_devices(), torch.no_grad():
        model, places, x = spread("gemma3"), put(torch.tensor([2, 0]), FIRST), put(ids.clone(), FIRST)
        with kvcar.attach(model, kvcar.lossless(model)) as attached:
            cache = attached.new_cache()
            logits(model, x, cache, (50, 40))
            cache.batch_select_indices(places)
            got = here(model(input_ids=x[:, 90:][places], past_key_values=cache).logits)
    torch.testing.assert_close(got, expected[[2, 0], 90:], atol=1e-5, rtol=1e-5)


def test_costs_of_blocks_over_two_devices():
    ids, single = token_ids(180), tiny_model("llama")
    bundle = fitted(single, codec="linear8", metric="effect", times_smaller=4)
    expected = {(cost.layers, cost.kinds): cost.nats for cost in block_costs(single, bundle, ids)}
    with pretend_devices():
        found = {(cost.layers, cost.kinds): cost.nats for cost in block_costs(spread("llama"), bundle, ids)}
    assert found == pytest.approx(expected, rel=1e-3)


def test_a_fit_over_two_devices_is_that_over_one():
    given = {"times_smaller": 3, "samples": False, "effect_tokens": 256}
    windows, ids, single = token_ids(256, batch=6), token_ids(150, batch=2), tiny_model("llama")
    bundle = kvcar.fit(single, token_ids=windows, **given)
    with kvcar.attach(single, bundle) as attached:
        expected = logits(single, ids, attached.new_cache(), SIZES)
    with pretend_devices():
        model = spread("llama")
        own = kvcar.fit(model, token_ids=windows, **given)
        assert own.plan.blocks == bundle.plan.blocks
        for each in (own, bundle):
            with kvcar.attach(model, each) as attached:
                cache = attached.new_cache()
                got = logits(model, put(ids.clone(), FIRST), cache, SIZES)
            torch.testing.assert_close(here(got), expected, atol=1e-3, rtol=1e-3)


def test_padding_forks_and_decoded_caches():
    ids, mask = token_ids(150, batch=2), torch.ones(2, 150, dtype=torch.int64)
    mask[0, :20] = 0
    results = []
    for two in (False, True):
        with pretend_devices():
            model, device = (spread("llama"), FIRST) if two else (tiny_model("llama"), torch.device("cpu"))
            x, m = put(ids.clone(), device), put(mask.clone(), device)
            with torch.no_grad(), kvcar.attach(model, kvcar.lossless(model)) as attached:
                bundle = attached.bundle
                for keep in (False, True):
                    cache = kvcar.KVCarCache(bundle, keep_decoded=keep)
                    model(input_ids=x[:, :140], attention_mask=m[:, :140], past_key_values=cache)
                    fork = cache.fork()
                    for own in (cache, fork):
                        results.append(here(model(input_ids=x[:, 140:], attention_mask=m, past_key_values=own).logits))
    for one, other in zip(results[:4], results[4:], strict=True):
        torch.testing.assert_close(other, one, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("profile", ["balanced", "stored"])
def test_everything_runs_away_from_the_cpu(profile, tmp_path):
    """What a GPU user does, on a device that takes no tensors of the CPU."""
    tokenizer, text = words_tokenizer(), "\n\n".join(words(100, seed) for seed in range(120))
    with pretend_devices():
        model = on_one_device(tiny_model("llama"))
        given = {"profile": profile, "times_smaller": 3, "tokens": 3072, "effect_tokens": 512, "samples": False}
        bundle = kvcar.fit(model, tokenizer, text, **given)
        assert bundle.figures["held_out"]["kl_divergence"] >= 0
        bundle.save_pretrained(tmp_path / "bundle")
        bundle = kvcar.Bundle.from_pretrained(tmp_path / "bundle")
        found = kvcar.evaluate(model, bundle, tokenizer, text, context=256)
        assert found.kl_divergence.value < 1
        with kvcar.attach(model, bundle) as attached:
            ids = put(token_ids(200), FIRST)
            cache = attached.new_cache()
            out = model.generate(ids, past_key_values=cache, max_new_tokens=4, do_sample=False)
            cache.save(tmp_path / "own.ctx")
            cache = kvcar.KVCarCache.load(tmp_path / "own.ctx", model)
            model.generate(out, past_key_values=cache, max_new_tokens=4, do_sample=False)


def test_a_model_away_from_the_cpu_writes_its_samples():
    with pretend_devices():
        windows = sample_windows(on_one_device(tiny_model("llama")), words_tokenizer(), 2, 24, 0)
    assert where(windows) == torch.device("cpu")
    assert windows.shape == (2, 24)


def test_records_are_made_away_from_the_cpu():
    model, ids = tiny_model("gpt2"), token_ids(256, batch=1)
    bundle = fitted(model, codec="linear8", metric="effect", times_smaller=4)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    keys, values = (torch.stack([getattr(layer, side)[0] for layer in cache.layers]) for side in ("keys", "values"))
    key = RecordKey("0" * 64, 0)
    expected = encode_record(RecordCoder(bundle, lambda _: None, torch.float32), keys, values, key)
    with pretend_devices():
        coder = RecordCoder(bundle, lambda _: None, torch.float32, FIRST)
        assert encode_record(coder, put(keys, FIRST), put(values, FIRST), key) == expected
