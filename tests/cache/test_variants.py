"""Other ways into a pass, other orders of calls, other settings of PyTorch: right, or refused with the cache as it was."""

import threading
import warnings

import pytest
import torch
from bundles import fitted
from tiny import tiny_model, token_ids
from transformers import DynamicCache

import kvcar
from kvcar.errors import AttachError, CacheStateError, InputError, UnsupportedModelError
from kvcar.models.structure import CACHE_NAME
from kvcar.plan import CacheConfig

PAGES = CacheConfig(window=0, sinks=4, page_tokens=32)
PARTS = (70, 20, 1, 1, 40, 1)


def lossless(model):
    return kvcar.lossless(model, cache=PAGES)


@torch.no_grad()
def steps(model, cache, ids=None, parts=PARTS, **given):
    ids = token_ids(sum(parts)) if ids is None else ids
    return torch.cat([model(part, **{CACHE_NAME: cache}, **given).logits for part in ids.split(parts, dim=1)], dim=1)


def own(model):
    return DynamicCache(config=model.config)


@pytest.mark.parametrize("inner", ["another cache", "no cache"])
def test_a_pass_within_a_pass_leaves_the_outer_one_its_past(inner):
    model = tiny_model("llama")
    expected, within = steps(model, own(model)), model(token_ids(40, seed=9)).logits
    with kvcar.attach(model, lossless(model)) as attached, torch.no_grad():
        found = []

        def run(*_):
            handle.remove()
            found.append(model(token_ids(40, seed=9), **{CACHE_NAME: caches[inner]}).logits)

        caches = {"another cache": attached.new_cache(), "no cache": None}
        cache = attached.new_cache()
        first = steps(model, cache, token_ids(sum(PARTS))[:, :70], (70,))
        handle = model.model.layers[2].register_forward_pre_hook(run)
        rest = steps(model, cache, token_ids(sum(PARTS))[:, 70:], PARTS[1:])
    torch.testing.assert_close(torch.cat([first, rest], 1), expected, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(found[0], within, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("layer", [0, 3], ids=["first layer", "last layer"])
def test_a_pass_within_a_pass_over_the_same_cache_is_refused(layer):
    model = tiny_model("llama")
    with kvcar.attach(model, lossless(model)) as attached, torch.no_grad():
        cache = attached.new_cache()
        steps(model, cache)

        def run(*_):
            handle.remove()
            model(token_ids(3), **{CACHE_NAME: cache})

        handle = model.model.layers[layer].self_attn.o_proj.register_forward_hook(run)
        with pytest.raises((CacheStateError, AttachError)):
            model(token_ids(5), **{CACHE_NAME: cache})


def test_generation_that_was_interrupted_goes_on():
    model, ids = tiny_model("llama"), token_ids(100)
    expected = model.generate(ids, max_new_tokens=20, do_sample=False)
    passes = []

    def interrupt(*_):
        passes.append(1)
        if len(passes) == 9:
            raise KeyboardInterrupt

    with kvcar.attach(model, lossless(model)) as attached:
        cache = attached.new_cache()
        handle = model.model.layers[2].register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model.generate(ids, max_new_tokens=20, do_sample=False, **{CACHE_NAME: cache})
        handle.remove()
        known = expected[:, : cache.tokens + 1]
        left = expected.shape[1] - known.shape[1]
        assert torch.equal(model.generate(known, max_new_tokens=left, do_sample=False, **{CACHE_NAME: cache}), expected)


OPERATIONS = {
    "crop": lambda cache: cache.crop(-10),
    "reset": lambda cache: cache.reset(),
    "fork": lambda cache: cache.fork(),
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([0])),
    "flush": lambda cache: cache.flush_window(),
}


@pytest.mark.parametrize("elsewhere", [True, False], ids=["another thread", "a hook"])
@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_what_changes_a_cache_in_the_middle_of_a_pass(operation, elsewhere):
    """Another thread is refused; in a hook it is done, and the pass is refused."""
    model, said = tiny_model("llama"), []

    def run():
        try:
            operation(cache)
        except CacheStateError as error:
            said.append(error)

    def hook(*_):
        if elsewhere:
            thread = threading.Thread(target=run)
            thread.start()
            thread.join()
        else:
            run()

    with kvcar.attach(model, lossless(model)) as attached:
        cache, twin = attached.new_cache(), attached.new_cache()
        for each in (cache, twin):
            steps(model, each)
        handle = model.model.layers[2].self_attn.o_proj.register_forward_hook(hook)
        try:
            steps(model, cache, token_ids(5), (5,))
        except (AttachError, CacheStateError) as error:
            said.append(error)
        finally:
            handle.remove()
        assert len(said) == 1
        if elsewhere:
            steps(model, twin, token_ids(5), (5,))
            more = (steps(model, each, token_ids(3, seed=2), (3,)) for each in (cache, twin))
            assert torch.equal(*more)


def test_a_cache_that_the_model_leaves_out_on_the_way_is_missed():
    model = tiny_model("llama")
    with kvcar.attach(model, lossless(model)) as attached, torch.no_grad():
        cache = attached.new_cache()
        steps(model, cache)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.gradient_checkpointing_enable()
        model.train()
        # Newer releases leave it out only where there are gradients, and then what they say is right.
        got, refusal = None, ""
        try:
            got = steps(model, cache, token_ids(5), (5,))
        except UnsupportedModelError as error:
            refusal = str(error)
        assert (got is None) == ("checkpointing" in refusal)
        if got is None:
            assert cache.tokens == sum(PARTS)
            got = steps(model.eval(), cache, token_ids(5), (5,))
        plain = own(model.eval())
        steps(model, plain)
        torch.testing.assert_close(got, steps(model, plain, token_ids(5), (5,)), atol=1e-4, rtol=1e-4)


def replace_attention(model):
    model.model.layers[1].self_attn = tiny_model("llama").model.layers[1].self_attn


def call_other_attention(model):
    layer = model.model.layers[1].self_attn
    layer.config = type(layer.config)(**layer.config.to_dict())
    layer.config._attn_implementation = "sdpa"


@pytest.mark.parametrize("change", [replace_attention, call_other_attention])
def test_attention_that_runs_past_the_cache_is_noticed_in_the_next_step(change):
    model = tiny_model("llama")
    with kvcar.attach(model, lossless(model)) as attached:
        cache = attached.new_cache()
        steps(model, cache)
        before = model.model.layers[1].self_attn, model.model.layers[1].self_attn.config
        change(model)
        with pytest.raises(AttachError, match=r"layers \[1\]|switched"):
            steps(model, cache, token_ids(1), (1,))
        assert cache.tokens == sum(PARTS)
        model.model.layers[1].self_attn, model.model.layers[1].self_attn.config = before


def test_a_layer_taken_out_is_another_model():
    model = tiny_model("llama")
    with kvcar.attach(model, lossless(model)) as attached:
        del model.model.layers[3]
        with pytest.raises(kvcar.errors.ModelMismatchError):
            steps(model, attached.new_cache())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("options", [{"times_smaller": 3}, {"codec": "linear", "bits": 8, "window": 0}], ids=str)
def test_pytorchs_default_dtype_changes_nothing(options, backend, dtype, monkeypatch):
    monkeypatch.setenv("KVCAR_KERNELS", backend)
    model = tiny_model("llama")
    bundle = fitted(model, **options)
    with kvcar.attach(model, bundle) as attached:
        expected = steps(model, attached.new_cache())
    torch.set_default_dtype(dtype)
    try:
        again = fitted(model, **options)
        with kvcar.attach(model, bundle) as attached:
            got = steps(model, attached.new_cache())
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got, expected)
    assert again.digest == bundle.digest


def test_attaching_under_autocast_is_attaching():
    model = tiny_model("llama")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        attached = kvcar.attach(model, lossless(model))
        under = steps(model, attached.new_cache())
        plain = steps(model, own(model))
    got = steps(model, attached.new_cache())
    attached.detach()
    torch.testing.assert_close(got, steps(model, own(model)), atol=1e-3, rtol=1e-4)
    assert (under - plain).norm() < 0.1 * plain.norm()


@pytest.mark.parametrize("positions", [torch.ones(1, 3, dtype=torch.bool), [[0, 1, 2]]], ids=["truth values", "a list"])
def test_positions_that_are_none_are_refused(positions):
    model = tiny_model("llama")
    with (
        kvcar.attach(model, lossless(model)) as attached,
        pytest.raises((InputError, UnsupportedModelError), match="whole numbers"),
    ):
        steps(model, attached.new_cache(), token_ids(3), (3,), position_ids=positions)


@pytest.mark.parametrize("shape", [(0, 5), (1, 0)], ids=["no sequence", "no token"])
def test_nothing_at_all_is_refused(shape):
    model = tiny_model("llama")
    ids = torch.zeros(shape, dtype=torch.int64)
    with kvcar.attach(model, lossless(model)) as attached:
        for run in (
            lambda: model(ids, **{CACHE_NAME: attached.new_cache()}),
            lambda: model.generate(ids, max_new_tokens=2),
        ):
            with pytest.raises(InputError, match=r"no new token|no sequence"):
                run()


def test_sequences_are_selected_by_a_slice_too():
    model = tiny_model("llama")
    with kvcar.attach(model, lossless(model)) as attached:
        cache, plain = attached.new_cache(), own(model)
        for each in (cache, plain):
            steps(model, each, token_ids(sum(PARTS), batch=3))
            each.batch_select_indices(slice(0, 2))
        more = token_ids(4, batch=2, seed=3)
        got, expected = (steps(model, each, more, (4,)) for each in (cache, plain))
        torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-4)
        with pytest.raises(InputError, match="sequences 0 to 1"):
            cache.batch_select_indices(None)


def test_layers_of_an_attached_model_are_not_attached_twice():
    model, other = tiny_model("llama"), tiny_model("llama", seed=4)
    other.model, other.lm_head = model.model, model.lm_head
    with kvcar.attach(model, lossless(model)) as attached:
        with pytest.raises(AttachError, match="part of another one"):
            kvcar.attach(other, lossless(other))
        with pytest.raises(UnsupportedModelError, match="cannot generate"):
            kvcar.attach(model.model, lossless(model.model))
        got = steps(model, attached.new_cache())
    torch.testing.assert_close(got, steps(model, own(model)), atol=1e-3, rtol=1e-4)


def test_a_compiled_model_is_attached_as_the_model_that_it_wraps():
    model = tiny_model("llama", num_hidden_layers=2)
    compiled = torch.compile(model, backend="eager")
    with kvcar.attach(compiled, lossless(compiled)) as attached:
        got = steps(compiled, attached.new_cache())
    torch.testing.assert_close(got, steps(model, own(model)), atol=1e-3, rtol=1e-4)


def test_layers_without_parameters_of_their_own():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(tiny_model("llama"), {torch.nn.Linear}, dtype=torch.qint8)
    with kvcar.attach(model, lossless(model)) as attached:
        got = steps(model, attached.new_cache())
    torch.testing.assert_close(got, steps(model, own(model)), atol=1e-2, rtol=1e-2)
