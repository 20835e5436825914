"""Weights and adapters that change after a model was attached are noticed before a new cache is filled."""

import copy

import pytest
import torch
from bundles import fitted
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from tiny import tiny_model, token_ids

import kvcar
from kvcar.cache.cache import KVCarCache
from kvcar.errors import AttachError, ContextError, ModelMismatchError, UnsupportedModelError
from kvcar.models.fingerprint import fingerprint, mismatch
from kvcar.models.weights import weights_state


def add_adapter(model, name, seed):
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False), name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for own, parameter in model.named_parameters():
            if f".{name}." in own:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture
def adapted():
    """A model with the adapters a and b, of which a is on."""
    model = tiny_model("llama")
    add_adapter(model, "a", 1)
    add_adapter(model, "b", 2)
    model.set_adapter("a")
    return model.eval()


def each_layer(model, method, *args):
    for module in model.modules():
        if hasattr(module, "lora_A"):
            getattr(module, method)(*args)


CHANGES = {
    "another adapter": lambda model: model.set_adapter("b"),
    "both adapters": lambda model: model.set_adapter(["a", "b"]),
    "adapters off": lambda model: model.disable_adapters(),
    "an adapter merged": lambda model: each_layer(model, "merge"),
    "an adapter added and on": lambda model: add_adapter(model, "c", 3),
    "an adapter scaled": lambda model: each_layer(model, "scale_layer", 0.5),
    "weights of an adapter": lambda model: model.get_parameter(
        "model.layers.1.self_attn.k_proj.lora_A.a.weight"
    ).data.mul_(2),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_adapters_is_refused_at_the_next_new_cache(adapted, change):
    with kvcar.attach(adapted, fitted(adapted, times_smaller=3)):
        before = adapted.generate(token_ids(100), max_new_tokens=4, do_sample=False)
        assert torch.equal(adapted.generate(token_ids(100), max_new_tokens=4, do_sample=False), before)
        CHANGES[change](adapted)
        with pytest.raises(ModelMismatchError, match="fit a bundle for this model"):
            adapted.generate(token_ids(100), max_new_tokens=4)


def one_row(model):
    with torch.no_grad():
        model.get_parameter("model.layers.1.self_attn.k_proj.weight")[3] += 1


def replaced(model):
    projection = model.model.layers[1].self_attn.v_proj
    projection.weight = torch.nn.Parameter(projection.weight.detach().clone())


def other_rotation(model):
    rotary = copy.deepcopy(model.model.rotary_emb)
    rotary.inv_freq = rotary.inv_freq / 4
    return rotary


WRITES = {
    "other weights loaded": (
        lambda model: model.load_state_dict(tiny_model("llama", seed=5).state_dict()), ModelMismatchError,
    ),
    "all written through .data": (lambda model: [p.data.mul_(1.5) for p in model.parameters()], ModelMismatchError),
    "one row written": (one_row, AttachError),
    "some rows written past autograd": (lambda model: model.model.layers[1].mlp.up_proj.weight.data[20:23].mul_(3), AttachError),
    "a parameter replaced": (replaced, AttachError),
    "another dtype": (lambda model: model.bfloat16(), AttachError),
    "other frequencies": (lambda model: model.model.rotary_emb.inv_freq.mul_(0.25), AttachError),
    "another rotary module": (lambda model: setattr(model.model, "rotary_emb", other_rotation(model)), AttachError),
}  # fmt: skip


@pytest.mark.parametrize("write", WRITES)
def test_weights_that_are_written_to_are_refused_at_the_next_new_cache_and_long_pass(write):
    model = tiny_model("llama")
    change, error = WRITES[write]
    with kvcar.attach(model, fitted(model, times_smaller=3)) as attached, torch.no_grad():
        cache = attached.new_cache()
        model(token_ids(100), past_key_values=cache)
        change(model)
        with pytest.raises(error):
            model.generate(token_ids(50), max_new_tokens=4)
        with pytest.raises(error):
            model(token_ids(50), past_key_values=cache)
        assert cache.tokens == 100


def test_frequencies_that_a_model_changes_itself_are_its_own_affair():
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    model = tiny_model("llama", rope_parameters=rope)
    frequencies, ids = model.model.rotary_emb.inv_freq, token_ids(60)
    with kvcar.attach(model, fitted(model, codec="identity")) as attached, torch.no_grad():
        model(ids, position_ids=torch.arange(500, 560)[None], use_cache=False)
        assert model.model.rotary_emb.inv_freq is not frequencies
        model(ids, past_key_values=attached.new_cache())


def test_adapters_that_play_no_part_change_nothing(adapted):
    with kvcar.attach(adapted, fitted(adapted, times_smaller=3)):
        before = adapted.generate(token_ids(100), max_new_tokens=4, do_sample=False)
        add_adapter(adapted, "c", 3)
        adapted.set_adapter("a")
        adapted.delete_adapter("b")
        assert torch.equal(adapted.generate(token_ids(100), max_new_tokens=4, do_sample=False), before)


def test_without_its_adapters_a_model_is_recognised_as_itself_and_an_adapter_by_its_weights(adapted):
    own, alone = fingerprint(tiny_model("llama")), tiny_model("llama")
    add_adapter(alone, "other name", 1)
    assert mismatch(own, fingerprint(adapted)) is not None
    assert mismatch(fingerprint(alone), fingerprint(adapted)) is None, "the name of an adapter says nothing"
    adapted.set_adapter("b")
    assert "that are on: b" in mismatch(fingerprint(alone), fingerprint(adapted))
    adapted.disable_adapters()
    assert fingerprint(adapted).digest == own.digest


def test_a_context_of_one_adapter_is_not_loaded_under_another(adapted, tmp_path):
    bundles, path = {}, tmp_path / "a.kvcar"
    for name in ("b", "a"):
        adapted.set_adapter(name)
        bundles[name] = kvcar.lossless(adapted)
    with kvcar.attach(adapted, bundles["a"]) as attached:
        cache = attached.new_cache()
        with torch.no_grad():
            adapted(token_ids(150), past_key_values=cache)
        cache.save(path)
        assert KVCarCache.load(path, adapted).tokens == 150
        adapted.set_adapter("b")
        with pytest.raises(ModelMismatchError):
            KVCarCache.load(path, adapted)
    with pytest.raises(ModelMismatchError):
        KVCarCache.load(path, adapted, bundles["a"])
    with kvcar.attach(adapted, bundles["b"]), pytest.raises(ContextError, match="another bundle"):
        KVCarCache.load(path, adapted)


def test_of_a_peft_model_its_base_is_attached(tmp_path):
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    wrapped = get_peft_model(tiny_model("llama"), config).eval()
    base, ids = wrapped.get_base_model(), token_ids(100)
    plain = wrapped.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
    with kvcar.attach(wrapped, kvcar.lossless(wrapped)) as attached:
        assert attached.model is base
        assert torch.equal(wrapped.generate(input_ids=ids, max_new_tokens=8, do_sample=False), plain)
        with wrapped.disable_adapter(), pytest.raises(ModelMismatchError):
            wrapped.generate(input_ids=ids, max_new_tokens=8)


def test_looking_at_weights_leaves_no_trace_and_does_not_depend_on_the_mode():
    model = tiny_model("gpt2")
    with torch.inference_mode():
        first, made_inside = weights_state(model), tiny_model("gpt2", seed=1)
    assert first == weights_state(model)
    assert weights_state(made_inside) == weights_state(made_inside)
    assert weights_state(copy.deepcopy(model)) != first


def test_an_adapter_that_is_a_cache_itself_is_refused_and_one_of_tokens_works():
    prefixed = get_peft_model(tiny_model("llama"), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
    with pytest.raises(UnsupportedModelError, match=r"\(PREFIX_TUNING\) is itself a cache"):
        kvcar.attach(prefixed, kvcar.lossless(prefixed.get_base_model()))
    with pytest.raises(UnsupportedModelError, match="is itself a cache"):
        kvcar.lossless(prefixed)
    prompted = get_peft_model(
        tiny_model("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    ).eval()
    expected = prompted.generate(input_ids=token_ids(100), max_new_tokens=8, do_sample=False)
    with kvcar.attach(prompted, kvcar.lossless(prompted, window=0)):
        assert torch.equal(prompted.generate(input_ids=token_ids(100), max_new_tokens=8, do_sample=False), expected)
