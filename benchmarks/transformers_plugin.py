"""A plugin of pytest: the models that transformers' own tests make run over kvcar's caches. Used by ``transformers_tests.py``.

A model is attached, with a bundle that loses nothing, when a test first generates with it or calls it with a cache of its
own making; all are detached when the test ends. What a test looks up inside a ``DynamicCache`` is looked up in what a
``KVCarCache`` holds instead. Written for each test: what came of it, and how many passes ran over a cache of kvcar's.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, GPT2Config, LlamaConfig, PreTrainedModel
from transformers.generation.utils import GenerationMixin

from kvcar import CacheConfig, KVCarCache, attach, lossless
from kvcar.cache.attach import Attachment, attachment_of
from kvcar.cache.attention import STAND_IN_PREFIX
from kvcar.cache.snapshot import contents_of
from kvcar.errors import KVCarError
from kvcar.models.demo import FOLDER_NAME, cache_root

PLAIN, OUTPUT = "KVCAR_PLAIN", "KVCAR_OUTCOMES"
"""Variables: to leave all as it is, and the file of outcomes."""

_TEST_SECONDS = 300
_DEMO = "HuggingFaceTB/SmolLM2-135M-Instruct"
# Every token goes into pages as soon as its pass is over.
_CACHE = CacheConfig(window=0, sinks=0, page_tokens=32)
_attached: list[Attachment] = []
_passes = 0
_outcomes: dict[str, dict[str, Any]] = {}
_plain = os.environ.get(PLAIN) == "1"


class _DynamicOrCompressed(type):
    """In place of ``DynamicCache`` in a module of tests, for their checks that the default cache is one."""

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, (DynamicCache, KVCarCache))

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return DynamicCache(*args, **kwargs)


class _Default(metaclass=_DynamicOrCompressed):
    pass


def _attach(model: Any) -> Attachment:
    if model.config.model_type == "llama":
        # A test sets it so that caches of sliding windows can be asked for; the model itself knows of none.
        vars(model.config).pop("sliding_window", None)
    found, attention = attachment_of(model), str(model.config.get_text_config()._attn_implementation)
    if found is not None and not attention.startswith(STAND_IN_PREFIX):
        # A test switched it, which needs to be attached anew.
        _attached.remove(found)
        found.detach()
        model.set_attn_implementation(attention)
        found = None
    if found is None:
        found = attach(model, lossless(model, cache=_CACHE))
        _attached.append(found)
    return found


def _generate(real: Callable[..., Any]) -> Callable[..., Any]:
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("cache_implementation") == "dynamic":
            del kwargs["cache_implementation"]  # what every generate takes by default: kvcar's, once attached
        if getattr(self, "_is_stateful", False) or self.config.is_encoder_decoder:
            return real(self, *args, **kwargs)
        own = self.generation_config.cache_implementation
        if own is not None and attachment_of(self) is None:
            kwargs.setdefault(
                "cache_implementation", own
            )  # a test asks for it by way of the model, which attaching outweighs
        _attach(self)
        return real(self, *args, **kwargs)

    return generate


def _call(model: Any, *args: Any, **kwargs: Any) -> Any:
    """As the model would make a cache for itself, give it one."""
    use_cache = kwargs.get("use_cache", getattr(model.config.get_text_config(), "use_cache", False))
    wants = use_cache and kwargs.get("past_key_values") is None
    if wants and hasattr(model, "generate") and not model.training and not kwargs.get("output_attentions"):
        kwargs["past_key_values"] = _attach(model).new_cache()
    return torch.nn.Module.__call__(model, *args, **kwargs)


def _counted(real: Callable[..., Any]) -> Callable[..., Any]:
    def begin_pass(self: Any, *args: Any, **kwargs: Any) -> Any:
        global _passes
        _passes += 1
        return real(self, *args, **kwargs)

    return begin_pass


def _of_the_demo_model(real: Callable[..., Any], is_model: bool) -> Callable[..., Any]:
    """Checkpoints without the network: the model of transformers' integration tests is kvcar's demo model, up to its
    quantisation; all others are tiny random ones, with its tokenizer.
    """

    def from_pretrained(name: Any, *args: Any, **kwargs: Any) -> Any:
        folder = cache_root() / FOLDER_NAME
        if Path(str(name)).exists() or not folder.is_dir():
            return real(name, *args, **kwargs)
        if is_model and name != _DEMO:
            return _tiny(str(name), **{k: kwargs[k] for k in ("dtype", "attn_implementation") if k in kwargs})
        return real(str(folder), *args, **kwargs)

    return from_pretrained


def _tiny(name: str, **options: Any) -> Any:
    """A random model of GPT-2's kind, where the name says so, or Llama's."""
    shape: dict[str, Any] = {"vocab_size": 49152, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    gpt2 = GPT2Config(**shape, n_embd=32, n_layer=3, n_head=4, n_positions=512)
    llama = LlamaConfig(
        **shape, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=1024,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(gpt2 if "gpt2" in name.lower() else llama, **options).eval()


def _check_format(real: Callable[..., Any]) -> Callable[..., Any]:
    def check(self: Any, batch_size: int, past_key_values: Any, seq_length: int, config: Any) -> None:
        if not isinstance(past_key_values, KVCarCache):
            return real(self, batch_size, past_key_values, seq_length, config)
        assert (past_key_values.batch_size, past_key_values.get_seq_length()) == (batch_size, seq_length)
        assert len(past_key_values) == config.num_hidden_layers
        return None

    return check


def _check_equal(real: Callable[..., Any]) -> Callable[..., Any]:
    def check(self: Any, cache1: Any, cache2: Any) -> None:
        if not isinstance(cache1, KVCarCache):
            return real(self, cache1, cache2)
        one, two = (contents_of(each, keep_window=True) for each in (cache1, cache2))
        assert (one.tokens, one.paged) == (two.tokens, two.paged)
        for first, second in zip(one.units, two.units, strict=True):
            torch.testing.assert_close(first.raw, second.raw, atol=1e-5, rtol=1e-5)
        return None

    return check


def pytest_configure() -> None:
    """Put kvcar in place."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained, AutoTokenizer.from_pretrained
    AutoModelForCausalLM.from_pretrained = _of_the_demo_model(model, True)  # pyright: ignore[reportAttributeAccessIssue]
    AutoTokenizer.from_pretrained = _of_the_demo_model(tokenizer, False)  # pyright: ignore[reportAttributeAccessIssue]
    signal.signal(signal.SIGALRM, _too_slow)
    if _plain:
        return
    mixin: Any = GenerationMixin
    mixin.generate = _generate(mixin.generate)
    PreTrainedModel.__call__ = _call  # pyright: ignore[reportAttributeAccessIssue]
    KVCarCache.begin_pass = _counted(KVCarCache.begin_pass)


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Of a model's tests keep those of generation, and judge them by what kvcar's caches hold."""
    _padded_left()
    mixins = {_owner(item) for item in items if "tests/models" in item.nodeid}
    mixins = {mixin for mixin in mixins if mixin.__name__ == "GenerationTesterMixin"}
    items[:] = [item for item in items if "tests/models" not in item.nodeid or _owner(item) in mixins]
    for item in items if not _plain else ():
        for name in {c.__module__ for c in item.cls.__mro__ if c.__module__.startswith("tests.")}:
            if vars(sys.modules[name]).get("DynamicCache") is DynamicCache:
                vars(sys.modules[name])["DynamicCache"] = _Default
    for mixin in mixins if not _plain else ():
        for name, make in _CHECKS.items():
            setattr(mixin, name, make(getattr(mixin, name)))


def pytest_runtest_setup(item: Any) -> None:
    """Ask for no weights of attention, which are never formed; tests that only look whether there is attention may know."""
    if not _plain:
        item.cls.has_attentions = item.name in _LOOK_FOR_ATTENTION


def _owner(item: Any) -> Any:
    """The class that a test is written in; those that inherit it may hold wrapped copies."""
    return next((c for c in reversed(item.cls.__mro__) if item.name in vars(c)), item.cls)


def _padded_left() -> None:
    """Have masks that the tests draw at random, or as triangles, mean padding on the left, as kvcar's caches need."""
    for module in [module for name, module in sys.modules.items() if name.startswith("tests.")]:
        for tester in [each for each in vars(module).values() if isinstance(each, type)]:
            real = vars(tester).get(_INPUTS)
            if real is not None and not hasattr(real, "padded_left"):
                setattr(tester, _INPUTS, _with_mask_padded_left(real))


def _with_mask_padded_left(real: Callable[..., Any]) -> Callable[..., Any]:
    def prepare(self: Any) -> Any:
        config, inputs = real(self)
        mask = inputs.get("attention_mask")
        if mask is not None and mask.ndim == 2:
            inputs["attention_mask"] = mask.sort(dim=-1).values
        return config, inputs

    prepare.padded_left = True  # pyright: ignore[reportFunctionMemberAccess]
    return prepare


_LOOK_FOR_ATTENTION = {
    "test_left_padding_compatibility", "test_custom_4d_attention_mask", "test_eager_padding_matches_padding_free_with_position_ids",
    "test_sdpa_padding_matches_padding_free_with_position_ids",
}  # fmt: skip
_INPUTS = "prepare_config_and_inputs_for_common"
_CHECKS = {"_check_past_key_values_for_generate": _check_format, "_check_caches_are_equal": _check_equal}


class TestTooSlowError(BaseException):
    """A test that takes too long."""


def _too_slow(*_: object) -> None:
    raise TestTooSlowError(f"more than {_TEST_SECONDS} s")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: Any) -> Iterator[None]:
    """Detach what a test attached, and count its passes."""
    global _passes
    _passes = 0
    common = sys.modules.get("tests.test_modeling_common")
    if common is not None:
        common.global_rng.seed(item.name)  # the same token ids in every run, some of which are padding
    signal.alarm(_TEST_SECONDS)
    yield
    signal.alarm(0)
    _outcomes.setdefault(item.nodeid, {})["passes"] = _passes
    while _attached:
        _attached.pop().detach()
    Path(os.environ[OUTPUT]).write_text(json.dumps(_outcomes), encoding="utf-8")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: Any, call: Any) -> Iterator[Any]:
    """Note what came of a test, and why."""
    report = (yield).get_result()
    found = _outcomes.setdefault(item.nodeid, {"outcome": "passed", "reason": ""})
    if report.outcome == "passed":
        return
    error = None if call.excinfo is None else call.excinfo.value
    text = str(error) if report.outcome == "failed" else str(report.longrepr[2])
    lines = [line for line in text.replace("Skipped: ", "").splitlines() if line.strip()]
    refused = isinstance(error, KVCarError)
    reason = f"{type(error).__name__}: " * (report.outcome == "failed") + (lines[0] if lines else "")
    found.update(outcome="refused" if refused else report.outcome, reason=reason[:300], text=text[:5000])
