"""Models that kvcar would be wrong about are refused when they are attached, or at the next pass."""

import copy
import logging
import pickle
import threading

import pytest
import torch
from bundles import fitted
from tiny import FAMILIES, tiny_model, token_ids
from transformers import AutoModelForCausalLM, DiffLlamaConfig, DynamicCache, LlamaConfig, MixtralConfig

import kvcar
from kvcar.cache import guard
from kvcar.cache.cache import KVCarCache
from kvcar.errors import AttachError, CacheStateError, InputError, UnsupportedModelError
from kvcar.models.structure import CACHE_NAME

SMALL = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.2, "bos_token_id": 1,
    "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip


def built(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_models_that_are_right_pass_and_are_tried_once(family, dtype, caplog):
    model = tiny_model(family, dtype=dtype)
    bundle = kvcar.lossless(model)
    with caplog.at_level(logging.INFO, logger="kvcar"):
        kvcar.attach(model, bundle).detach()
        kvcar.attach(model, bundle).detach()
    assert sum("over lossless pages" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize(
    "config",
    [DiffLlamaConfig(**SMALL), LlamaConfig(**SMALL, is_causal=False)],
    ids=["values changed before attention", "attention to later tokens"],
)
def test_models_that_would_be_wrong_are_refused_and_left_as_they_were(config):
    model = built(config)
    before = model(token_ids(20)).logits
    with pytest.raises(
        UnsupportedModelError,
        match=r"other keys or values than it gives the cache|are not those that the cache was given|attends to later tokens|is not that of|attention in its own code",
    ):
        kvcar.attach(model, kvcar.lossless(model))
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(token_ids(20)).logits, before)


def test_what_is_wrong_in_padded_rows_alone_is_said(monkeypatch):
    model = tiny_model("llama")
    _, expected = guard.look_at(model, kvcar.lossless(model))
    wrong = expected.clone()
    wrong[:3] += 100.0
    monkeypatch.setattr(guard, "_own_logits", lambda model: wrong)
    with (
        kvcar.attach(model, kvcar.lossless(model)),
        pytest.raises(UnsupportedModelError, match="3 tokens of the padded"),
    ):
        guard.check_against(model, kvcar.lossless(model), wrong)


def test_a_model_that_says_something_else_in_chunks_is_judged_by_its_own_cache_in_chunks():
    model = tiny_model("llama")
    _, expected = guard.look_at(model, kvcar.lossless(model))
    with kvcar.attach(model, kvcar.lossless(model)):
        guard.check_against(model, kvcar.lossless(model), expected.roll(1, 0))


def test_attention_that_is_switched_while_attached_is_refused_at_the_next_pass():
    model = tiny_model("llama")
    with kvcar.attach(model, fitted(model, times_smaller=3)):
        model.set_attn_implementation("sdpa")
        with pytest.raises(AttachError, match="switched to 'sdpa'"):
            model.generate(token_ids(100), max_new_tokens=2)


def test_a_model_whose_settings_changed_is_tried_anew(caplog):
    model = tiny_model("llama")
    bundle = kvcar.lossless(model)
    with caplog.at_level(logging.INFO, logger="kvcar"):
        kvcar.attach(model, bundle).detach()
        model.set_attn_implementation("eager")
        kvcar.attach(model, bundle).detach()
        model.model.layers[1].self_attn.is_causal = False
        kvcar.attach(model, bundle).detach()
    assert sum("over lossless pages" in record.getMessage() for record in caplog.records) == 3


def _adding(layer, side):
    """Have the cache keep, of a layer's keys or values, another than the one that goes on to attention."""

    def before(module, args, kwargs):
        cache = kwargs[CACHE_NAME]

        class Changing:
            def update(self, *states_and_layer, **more):
                states = list(cache.update(*states_and_layer, **more))
                states[side] = states[side] + 1e-3
                return tuple(states)

            def __getattr__(self, name):
                return getattr(cache, name)

        return args, kwargs | {CACHE_NAME: Changing()}

    return layer.self_attn.register_forward_pre_hook(before, with_kwargs=True)


@pytest.mark.parametrize(("side", "name"), [(0, "keys"), (1, "values")], ids=["keys", "values"])
def test_keys_and_values_that_change_on_their_way_to_attention_are_refused_in_any_pass(side, name):
    model = tiny_model("llama")
    with kvcar.attach(model, kvcar.lossless(model)) as attached, torch.no_grad():
        cache, twin = attached.new_cache(), attached.new_cache()
        for each in (cache, twin):
            model(token_ids(100), past_key_values=each)
        handle = _adding(model.model.layers[2], side)
        with pytest.raises(UnsupportedModelError, match=f"the {name} that attention of layer 2 is given"):
            model(token_ids(1), past_key_values=cache)
        handle.remove()
        got, expected = (model(token_ids(1), past_key_values=each).logits for each in (cache, twin))
        assert torch.equal(got, expected)


def _with_mask(layer, change):
    def before(module, args, kwargs):
        given = kwargs["attention_mask"]
        given = torch.ones(1, 1, 30, 130, dtype=torch.bool).tril(100) if given is None else given
        return args, kwargs | {"attention_mask": change(given)}

    return layer.self_attn.register_forward_pre_hook(before, with_kwargs=True)


MASKS = {
    "a window that no config tells": lambda mask: mask & torch.ones_like(mask).triu(100 - 64),
    "a chunk that no config tells": lambda mask: mask & (torch.arange(mask.shape[-1]) >= 64),
    "later tokens": lambda mask: torch.ones_like(mask),
    "one pair": lambda mask: mask.index_put(tuple(map(torch.tensor, (0, 0, 29, 3))), torch.tensor(False)),
    "numbers added to scores": lambda mask: torch.where(mask, 0.01, torch.finfo(torch.float32).min),
    "numbers that hide a little": lambda mask: torch.where(mask, 0.0, -5.0),
    "another length": lambda mask: mask[..., 1:],
}


@pytest.mark.parametrize("change", MASKS.values(), ids=MASKS)
def test_masks_of_another_attention_are_refused_in_the_pass_that_they_come_in(change):
    model = tiny_model("llama")
    with kvcar.attach(model, kvcar.lossless(model)) as attached, torch.no_grad():
        cache = attached.new_cache()
        model(token_ids(100), past_key_values=cache)
        handle = _with_mask(model.model.layers[2], change)
        with pytest.raises(UnsupportedModelError, match="is not that of causal attention"):
            model(token_ids(30), past_key_values=cache)
        handle.remove()
        assert cache.tokens == 100
        model(token_ids(30), past_key_values=cache)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_that_becomes_bidirectional_while_attached_is_refused(implementation):
    model = tiny_model("llama")
    model.set_attn_implementation(implementation)
    with kvcar.attach(model, kvcar.lossless(model)) as attached, torch.no_grad():
        model.config.is_causal = False
        for layer in model.model.layers:
            layer.self_attn.is_causal = False
        with pytest.raises(UnsupportedModelError, match=r"later tokens|is not that of causal"):
            model(token_ids(30), past_key_values=attached.new_cache())


def test_gradients_are_refused_where_they_would_be_left_out():
    model = tiny_model("llama")
    with kvcar.attach(model, kvcar.lossless(model)) as attached:
        logits = model(token_ids(30), past_key_values=attached.new_cache()).logits
        with pytest.raises(UnsupportedModelError, match="gradients do not pass"):
            logits.sum().backward()


def test_a_model_made_of_the_config_of_an_attached_one_is_a_model_like_others():
    model = tiny_model("llama")
    with kvcar.attach(model, kvcar.lossless(model)):
        other = type(model)(model.config).eval()
        expected = other(token_ids(20)).logits
        with kvcar.attach(other, kvcar.lossless(other)) as attached:
            torch.testing.assert_close(other(token_ids(20), past_key_values=attached.new_cache()).logits, expected)
    assert model.config._attn_implementation == "sdpa"


def test_attention_weights_that_the_config_asks_for_are_refused():
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    with pytest.raises(UnsupportedModelError, match="output_attentions"):
        kvcar.attach(model, kvcar.lossless(model))
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_attention_weights_are_refused(family):
    model = tiny_model(family)
    with kvcar.attach(model, fitted(model, times_smaller=3)) as attached:
        cache = attached.new_cache()
        with torch.no_grad(), pytest.raises(UnsupportedModelError, match="output_attentions"):
            model(token_ids(10), past_key_values=cache, output_attentions=True)


def test_an_explicit_cache_of_the_caller_is_his_even_where_the_checkpoint_prefers_the_same():
    model = tiny_model("llama")
    model.generation_config.cache_implementation = "static"
    with kvcar.attach(model, fitted(model, times_smaller=3)):
        own = model.generate(token_ids(40), max_new_tokens=2, return_dict_in_generate=True)
        asked = model.generate(
            token_ids(40), max_new_tokens=2, cache_implementation="static", return_dict_in_generate=True
        )
    assert isinstance(own.past_key_values, KVCarCache)
    assert not isinstance(asked.past_key_values, KVCarCache)
    assert model.generation_config.cache_implementation == "static"


def test_the_same_prompt_again_on_a_filled_cache_says_what_to_do():
    model = tiny_model("llama")
    with kvcar.attach(model, fitted(model, times_smaller=3)) as attached:
        cache = attached.new_cache()
        model.generate(token_ids(100), past_key_values=cache, max_new_tokens=2)
        with pytest.raises(InputError, match="reset the cache"):
            model.generate(token_ids(100), past_key_values=cache, max_new_tokens=2)


@pytest.mark.parametrize("first", [True, False], ids=["begun inside", "begun outside"])
def test_inference_mode_may_come_and_go(first):
    model = tiny_model("llama")
    bundle, ids = fitted(model, times_smaller=3), token_ids(330)
    with kvcar.attach(model, bundle):
        expected, mixed = KVCarCache(bundle), KVCarCache(bundle)
        for place, part in enumerate(ids.split(110, dim=1)):
            with torch.no_grad():
                right = model(part, past_key_values=expected).logits
            with torch.inference_mode(place % 2 == (0 if first else 1)), torch.no_grad():
                got = model(part, past_key_values=mixed).logits
            assert torch.equal(got, right)
        mixed.reorder_cache(torch.tensor([0]))
        mixed.crop(-20)


def test_autocast_changes_no_more_than_it_does_without_kvcar():
    model = tiny_model("llama")
    ids = token_ids(200)

    def steps(cache):
        parts = [*ids[:, :190].split(64, dim=1), *ids[:, 190:].split(1, dim=1)]
        with torch.no_grad():
            return torch.cat([model(part, past_key_values=cache).logits.float() for part in parts], 1)

    plain = steps(DynamicCache(config=model.config))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        own = steps(DynamicCache(config=model.config))
    with kvcar.attach(model, fitted(model, codec="identity", bits=8, window=0)) as attached:
        before = steps(attached.new_cache())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            under = steps(attached.new_cache())
        after = steps(attached.new_cache())
    assert torch.equal(before, after), "a pass under autocast must leave nothing behind"
    assert (under - before).abs().mean() < 2 * (own - plain).abs().mean() + 1e-3


def test_nan_in_one_pass_leaves_the_cache_as_it_was():
    model = tiny_model("llama")
    bundle = fitted(model, times_smaller=3)
    with kvcar.attach(model, bundle), torch.no_grad():
        cache, twin = KVCarCache(bundle), KVCarCache(bundle)
        for each in (cache, twin):
            model(token_ids(150), past_key_values=each)
        broken = torch.full((1, 64, 64), torch.nan)
        with pytest.raises(CacheStateError, match="NaN or infinity"):
            model(inputs_embeds=broken, past_key_values=cache)
        assert cache.tokens == 150
        assert torch.equal(
            model(token_ids(80, seed=3), past_key_values=cache).logits,
            model(token_ids(80, seed=3), past_key_values=twin).logits,
        )


def test_a_deep_copy_is_a_fork_and_a_pickle_is_refused():
    model = tiny_model("llama")
    bundle = fitted(model, times_smaller=3)
    with kvcar.attach(model, bundle) as attached, torch.no_grad():
        cache = attached.new_cache()
        model(token_ids(200), past_key_values=cache)
        copied = copy.deepcopy(cache)
        assert copied.bundle is cache.bundle
        assert all(a is b for a, b in zip(copied._pages.arenas, cache._pages.arenas, strict=True))
        assert torch.equal(
            model(token_ids(1, seed=2), past_key_values=copied).logits,
            model(token_ids(1, seed=2), past_key_values=cache).logits,
        )
        with pytest.raises(TypeError, match=r"cache\.save"):
            pickle.dumps(cache)
        assert copy.deepcopy(attached.new_cache()).tokens == 0


@pytest.mark.parametrize("padded", [False, True], ids=["shifted", "padded"])
def test_positions_that_a_later_pass_leaves_out_are_refused_where_they_would_count_otherwise(padded):
    model = tiny_model("llama")
    bundle, ids = fitted(model, times_smaller=3), token_ids(140, batch=2)
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0) if padded else torch.arange(140)[None] + 50
    given = {"attention_mask": mask[:, :100]} if padded else {}
    with kvcar.attach(model, bundle) as attached, torch.no_grad():
        cache = attached.new_cache()
        model(ids[:, :100], position_ids=positions[:, :100], past_key_values=cache, **given)
        with pytest.raises(CacheStateError, match="go on elsewhere"):
            model(ids[:, 100:], past_key_values=cache, **({"attention_mask": mask} if padded else {}))
        assert cache.tokens == 100


def test_mixtures_of_experts_are_taken():
    model = built(MixtralConfig(**SMALL, num_local_experts=4))
    ids = token_ids(150, batch=2)
    plain = model.generate(ids, max_new_tokens=8, do_sample=False)
    with kvcar.attach(model, kvcar.lossless(model)):
        assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), plain)


def test_several_threads_that_attach_one_model_get_one_attachment():
    model = tiny_model("llama", seed=3)
    bundle, outcomes, start = kvcar.lossless(model), [], threading.Barrier(4)

    def attach():
        start.wait()
        try:
            outcomes.append(kvcar.attach(model, bundle))
        except AttachError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=attach) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(isinstance(each, AttachError) for each in outcomes) == [False, True, True, True]
    kvcar.detach(model)


@pytest.mark.parametrize("chunk", [0, -1, 1.5, "a"])
def test_a_chunk_of_no_tokens_is_refused(chunk):
    model = tiny_model("llama")
    with pytest.raises(InputError, match="prefill_chunk"):
        kvcar.attach(model, kvcar.lossless(model), prefill_chunk=chunk)


def test_a_padded_cache_wants_its_mask_in_later_passes_too():
    model = tiny_model("llama")
    bundle, ids = fitted(model, times_smaller=3), token_ids(101, batch=2)
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with kvcar.attach(model, bundle) as attached, torch.no_grad():
        cache = attached.new_cache()
        given = {"attention_mask": mask[:, :100], "position_ids": positions[:, :100]}
        model(ids[:, :100], past_key_values=cache, **given)
        with pytest.raises(InputError, match="give the mask over all 101 tokens"):
            model(ids[:, 100:], position_ids=positions[:, 100:], past_key_values=cache)
        assert cache.tokens == 100


def test_negative_positions_of_text_are_refused_and_of_padding_taken():
    model = tiny_model("llama")
    bundle, ids = fitted(model, times_smaller=3), token_ids(70)
    with kvcar.attach(model, bundle) as attached, torch.no_grad():
        with pytest.raises(CacheStateError, match="negative"):
            model(ids, position_ids=torch.arange(70)[None] - 5, past_key_values=attached.new_cache())
        mask = torch.ones_like(ids)
        mask[0, :5] = 0
        given = {"attention_mask": mask, "position_ids": torch.arange(70)[None] - 5}
        model(ids, past_key_values=attached.new_cache(), **given)


def test_positions_that_are_not_whole_numbers_are_refused():
    model = tiny_model("llama")
    positions = torch.arange(70)[None] + 0.5
    with (
        kvcar.attach(model, kvcar.lossless(model)) as attached,
        torch.no_grad(),
        pytest.raises(InputError, match="whole numbers"),
    ):
        model(token_ids(70), position_ids=positions, past_key_values=attached.new_cache())


def test_cropping_beyond_a_sliding_window_is_refused_before_anything_changes():
    model = tiny_model("gemma3")
    bundle, ids = fitted(model, bits=6), token_ids(151)
    with kvcar.attach(model, bundle) as attached, torch.no_grad():
        cache, twin = attached.new_cache(), attached.new_cache()
        for each in (cache, twin):
            model(ids[:, :150], past_key_values=each)
        with pytest.raises(CacheStateError, match="sliding window have forgotten"):
            cache.crop(-10)
        got, expected = (model(ids[:, 150:], past_key_values=each).logits for each in (cache, twin))
        assert torch.equal(got, expected)


def test_leaving_a_model_early_is_refused_with_all_its_layers_there():
    model = tiny_model("llama")
    with kvcar.attach(model, fitted(model, times_smaller=3)):
        with pytest.raises(UnsupportedModelError, match="assistant_early_exit"):
            model.generate(token_ids(40), max_new_tokens=4, assistant_early_exit=2)
        assert model.config.num_hidden_layers == 4
        assert model.generate(token_ids(40), max_new_tokens=4).shape == (1, 44)


@pytest.mark.parametrize("made", [copy.deepcopy, pickle.dumps], ids=["copied", "pickled"])
def test_an_attached_model_is_neither_copied_nor_pickled_and_saved_as_ever(made, tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "before")
    with kvcar.attach(model, kvcar.lossless(model)):
        with pytest.raises(AttachError, match="detach it first"):
            made(model)
        model.save_pretrained(tmp_path / "attached")
        assert (tmp_path / "before" / "config.json").read_text() == (tmp_path / "attached" / "config.json").read_text()
    made(model)


def test_detaching_while_another_thread_runs_is_refused():
    model = tiny_model("llama")
    attached = kvcar.attach(model, kvcar.lossless(model))
    inside, detached, outcome = threading.Event(), threading.Event(), []

    def wait(*_):
        inside.set()
        detached.wait(10)

    def run():
        with torch.no_grad():
            outcome.append(model(token_ids(50), past_key_values=attached.new_cache()).logits)

    expected = model(token_ids(50)).logits
    handle = model.model.layers[2].register_forward_pre_hook(wait)
    thread = threading.Thread(target=run)
    thread.start()
    assert inside.wait(10)
    with pytest.raises(AttachError, match="another thread is in a pass"):
        kvcar.detach(model)
    detached.set()
    thread.join()
    handle.remove()
    torch.testing.assert_close(outcome[0], expected)
    kvcar.detach(model)


def test_a_thread_whose_pass_failed_does_not_keep_a_model_attached():
    model = tiny_model("llama")
    attached = kvcar.attach(model, kvcar.lossless(model))
    handle = model.model.layers[2].register_forward_pre_hook(lambda *_: 1 / 0)
    failed, done = [], threading.Event()

    def run():
        try:
            model(token_ids(50), past_key_values=attached.new_cache())
        except ZeroDivisionError as error:
            failed.append(error)
        done.wait(10)

    thread = threading.Thread(target=run)
    thread.start()
    while not failed:
        thread.join(0.01)
    handle.remove()
    kvcar.detach(model)
    done.set()
    thread.join()


def test_a_cache_cropped_to_nothing_is_an_empty_one():
    """Padding, too, goes with the tokens."""
    model = tiny_model("llama")
    ids, mask = token_ids(40, batch=2), torch.ones(2, 40, dtype=torch.int64)
    mask[1, :9] = 0
    with torch.no_grad(), kvcar.attach(model, kvcar.lossless(model)) as attached:
        cache = attached.new_cache()
        model(ids, attention_mask=mask, past_key_values=cache)
        cache.crop(-40)
        got = model(ids, past_key_values=cache).logits
    torch.testing.assert_close(got, model(ids).logits, atol=1e-4, rtol=1e-4)


WRONG_PASSES = {
    "prefill": lambda cache, tokens: cache.tokens == 0,
    "a chunk after a past": lambda cache, tokens: cache.tokens > 0 and tokens > 1,
    "a step": lambda cache, tokens: tokens == 1,
}


@pytest.mark.parametrize("row", [0, 1], ids=["padded row", "other row"])
@pytest.mark.parametrize("wrong", WRONG_PASSES.values(), ids=WRONG_PASSES)
def test_attention_that_is_a_little_off_in_one_kind_of_pass_and_row_is_seen_at_attach(wrong, row, monkeypatch):
    model, right = tiny_model("llama"), KVCarCache.attend

    def off(cache, layer, query, *more):
        output = right(cache, layer, query, *more)
        if wrong(cache, query.shape[2]):
            output[row] *= 1.05
        return output

    monkeypatch.setattr(KVCarCache, "attend", off)
    name = "padded" if row == 0 else "other"
    with pytest.raises(UnsupportedModelError, match=rf"differs from its own cache: .* of the {name} sequence"):
        kvcar.attach(model, kvcar.lossless(model))


def logits_changed(model, change):
    model.lm_head.register_forward_hook(lambda module, args, output: change(output))
    return model


@pytest.mark.parametrize("lowest", [-torch.inf, torch.finfo(torch.float32).min], ids=["-inf", "lowest"])
def test_tokens_that_are_ruled_out_neither_refuse_a_model_nor_hide_what_is_wrong(lowest):
    model = logits_changed(tiny_model("llama"), lambda x: x.index_fill(-1, torch.arange(100, 128), lowest))
    bundle = kvcar.lossless(model)
    kvcar.attach(model, bundle).detach()
    _, expected = guard.look_at(tiny_model("llama", seed=1), kvcar.lossless(tiny_model("llama", seed=1)))
    _, own = guard.look_at(model := copy.deepcopy(model), bundle)
    assert guard._difference(own, own) == 0
    wrong = expected.index_fill(-1, torch.arange(100, 128), lowest)
    assert guard._difference(own, wrong) == pytest.approx(guard._difference(own[:, :100], wrong[:, :100]))
    assert guard._difference(own, wrong) > 0.5
    assert guard._difference(own, expected) == torch.inf


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_logits_that_are_none_are_refused(bad):
    model = logits_changed(tiny_model("llama"), lambda x: x.index_fill(-1, torch.arange(100, 128), bad))
    with pytest.raises(UnsupportedModelError, match="NaN or infinity"):
        kvcar.attach(model, kvcar.lossless(model))


def test_layers_that_the_config_has_lost_while_attached_are_told():
    model = tiny_model("llama")
    with kvcar.attach(model, kvcar.lossless(model)) as attached, torch.no_grad():
        model.config.num_hidden_layers = 3
        with pytest.raises(AttachError, match="3 layers, and had 4 when it was attached"):
            model(token_ids(20), past_key_values=attached.new_cache())


def test_more_queries_than_tokens_are_refused():
    model = tiny_model("llama")
    with kvcar.attach(model, kvcar.lossless(model)) as attached, torch.no_grad():
        cache = attached.new_cache()
        model.model.layers[1].register_forward_pre_hook(lambda *_: cache.check_mask(None, 0, 51))
        with pytest.raises(UnsupportedModelError, match="51 queries in a pass of 50 tokens"):
            model(token_ids(50), past_key_values=cache)
