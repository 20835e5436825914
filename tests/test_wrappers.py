"""Models as people hold them: offloaded by accelerate, with quantised weights, in a pipeline, with images, with attention of another name."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from optimum.quanto import freeze, qint8, quantize
from stepped import error, logits
from tiny import FAMILIES, tiny_model, token_ids
from tokenizers import Tokenizer, models, pre_tokenizers
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_
from transformers import (
    CLIPVisionConfig,
    DynamicCache,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    pipeline,
)

import kvcar
from kvcar.errors import UnsupportedModelError
from kvcar.models.fingerprint import fingerprint, mismatch

LAYERS = {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk", "model.layers.3": "cpu"}
ELSEWHERE = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"} | LAYERS


def quantised_by_quanto(model, folder):
    quantize(model, weights=qint8)
    freeze(model)
    return model


def quantised_by_hqq(model, folder):
    config = BaseQuantizeConfig(nbits=4, group_size=32)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name.endswith("_proj"):
            parent, _, own = name.rpartition(".")
            quantised = HQQLinear(module, config, compute_dtype=torch.float32, device="cpu")
            setattr(model.get_submodule(parent), own, quantised)
    return model


def quantised_by_torchao(model, folder):
    quantize_(model, Int8WeightOnlyConfig())
    return model


def activations_quantised_by_torchao(model, folder):
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model


def on_cpu_until_needed(model, folder):
    return cpu_offload(model, execution_device=torch.device("cpu"))


def on_disk_until_needed(model, folder):
    disk_offload(model, folder, execution_device=torch.device("cpu"))
    return model


def dispatched(model, folder):
    return dispatch_model(model, device_map=ELSEWHERE, main_device="cpu", offload_dir=folder)


WRAPPERS = [
    quantised_by_quanto,
    quantised_by_hqq,
    quantised_by_torchao,
    on_cpu_until_needed,
    on_disk_until_needed,
    dispatched,
]


@pytest.mark.parametrize("wrap", WRAPPERS, ids=[wrap.__name__ for wrap in WRAPPERS])
def test_a_wrapped_model_says_over_lossless_pages_what_it_says_without(wrap, tmp_path):
    model = wrap(tiny_model("llama"), str(tmp_path))
    ids = token_ids(150, batch=2)
    given = {"max_new_tokens": 5, "do_sample": False}
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        with kvcar.attach(model, kvcar.lossless(model)) as attached:
            cache = attached.new_cache()
            parts = [model(input_ids=part, past_key_values=cache).logits for part in ids.split(50, dim=1)]
            generated = model.generate(ids[:1, :20], **given)
        assert torch.equal(model.generate(ids[:1, :20], **given), generated)
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=1e-3, rtol=1e-3)
    assert cache.pages > 0


@pytest.mark.parametrize(
    "wrap",
    [quantised_by_hqq, quantised_by_torchao, activations_quantised_by_torchao, on_disk_until_needed],
    ids=lambda wrap: wrap.__name__,
)
def test_a_wrapped_model_is_fitted(wrap, tmp_path):
    model = wrap(tiny_model("llama"), str(tmp_path))
    bundle = kvcar.fit(
        model, token_ids=token_ids(256, batch=6), times_smaller=3, samples=False, effect_tokens=256, check=False
    )
    with torch.no_grad(), kvcar.attach(model, bundle) as attached:
        cache = attached.new_cache()
        model(input_ids=token_ids(150), past_key_values=cache)
        assert cache.pages > 0


def test_activations_rounded_to_few_bits_are_no_reason_to_refuse():
    model = activations_quantised_by_torchao(tiny_model("llama"), "")
    ids, sizes = token_ids(150), (50, 50, 50)
    expected = logits(model, ids, DynamicCache(config=model.config), sizes)
    with kvcar.attach(model, kvcar.lossless(model)) as attached:
        got = logits(model, ids, attached.new_cache(), sizes)
    assert error(got, expected) < 0.1


def test_a_model_that_rounds_activations_and_answers_wrongly_is_refused(monkeypatch):
    model = activations_quantised_by_torchao(tiny_model("llama"), "")
    own = kvcar.KVCarCache.attend

    def wrong(self, layer, query, *args):
        return own(self, layer, query.roll(1, dims=1), *args)

    monkeypatch.setattr(kvcar.KVCarCache, "attend", wrong)
    with pytest.raises(UnsupportedModelError, match="over lossless pages differs"):
        kvcar.attach(model, kvcar.lossless(model))


def test_quantised_weights_are_told_by_their_integers():
    first, second = (quantised_by_torchao(tiny_model("llama"), "") for _ in range(2))
    assert mismatch(fingerprint(first), fingerprint(second)) is None
    weight = second.model.layers[0].mlp.down_proj.weight
    weight.qdata.neg_()
    assert "weights differ" in str(mismatch(fingerprint(first), fingerprint(second)))


def test_quantised_weights_that_were_written_to_are_noticed():
    model = quantised_by_torchao(tiny_model("llama"), "")
    with kvcar.attach(model, kvcar.lossless(model)):
        model.model.layers[0].mlp.down_proj.weight.scale.data.mul_(2)
        with pytest.raises(kvcar.KVCarError, match=r"written to|weights"):
            model(input_ids=token_ids(20), past_key_values=kvcar.KVCarCache(kvcar.lossless(model)))


def test_weights_kept_elsewhere_are_those_of_the_model(tmp_path):
    loaded = tiny_model("llama")
    offloaded = dispatched(tiny_model("llama"), str(tmp_path))
    assert mismatch(fingerprint(loaded), fingerprint(offloaded)) is None
    assert mismatch(fingerprint(tiny_model("llama", seed=1)), fingerprint(offloaded)) is not None


def test_weights_that_are_nowhere_are_refused():
    with pytest.raises(UnsupportedModelError, match="load the model first"):
        kvcar.lossless(tiny_model("llama").to("meta"))


def test_a_pipeline_of_a_padded_batch():
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(128)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w2", padding_side="left")
    model = tiny_model("llama")
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    texts = [" ".join(f"w{i + 5}" for i in range(90)), "w7 w8 w9"]
    given = {"max_new_tokens": 8, "do_sample": False, "batch_size": 2}
    expected = generate(texts, **given)
    made = []
    with kvcar.attach(model, kvcar.lossless(model)) as attached:
        new = attached.new_cache
        attached.new_cache = lambda: made.append(new()) or made[-1]
        assert generate(texts, **given) == expected
    assert [cache.batch_size for cache in made] == [2]


def test_images_whose_tokens_are_ordinary_ones():
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision, text_config=FAMILIES["llama"](), image_token_index=120)
    model = LlavaForConditionalGeneration(config).eval()
    ids = token_ids(100).clamp_max(110)
    ids[0, 10:14] = 120
    image, more = torch.randn(1, 3, 16, 16), token_ids(30, seed=1).clamp_max(110)

    def said(cache):
        first = model(input_ids=ids, pixel_values=image, past_key_values=cache).logits
        return torch.cat([first, model(input_ids=more, past_key_values=cache).logits], dim=1)

    with torch.no_grad():
        expected = said(DynamicCache(config=model.config))
        blank = model(input_ids=ids, pixel_values=image * 0, use_cache=False).logits
        with kvcar.attach(model, kvcar.lossless(model)) as attached:
            got = said(attached.new_cache())
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(blank, expected[:, :100], atol=1e-3)  # the image matters


@pytest.mark.parametrize("name", ["flash_attention_2", "flex_attention"])
def test_attention_of_another_name_is_stood_in_for_and_the_log_says_so(name):
    model, ids = tiny_model("llama"), token_ids(100)
    given = {"max_new_tokens": 3, "do_sample": False}
    expected = model.generate(ids, **given)
    model.config._attn_implementation_internal = name
    with kvcar.attach(model, kvcar.lossless(model)) as attached:
        assert f"attention is kvcar's own, not {name}" in str(attached)
        assert torch.equal(model.generate(ids, **given), expected)
    assert model.config._attn_implementation == name
