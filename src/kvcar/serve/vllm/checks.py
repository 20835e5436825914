# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
"""What kvcar in vLLM supports; everything else is refused when the model has been loaded, before a token is computed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm import __version__ as VLLM_VERSION

from ...bundle import Bundle
from ...errors import InputError, ModelMismatchError, PlanError, UnsupportedModelError
from .options import Options

TESTED = ("0.32",)
"""Versions of vLLM, by their first two numbers, that the tests were run with."""


def check_version(options: Options) -> None:
    """Refuse versions of vLLM that nobody tried; raises UnsupportedModelError."""
    if ".".join(VLLM_VERSION.split(".")[:2]) not in TESTED and not options.allow_untested:
        raise UnsupportedModelError(
            f"kvcar was tested with vLLM {', '.join(TESTED)}, and this is {VLLM_VERSION}; install one of those, or set "
            "allow_untested in kvcar's options to try"
        )


def check_config(config: Any, options: Options) -> None:
    """Refuse what kvcar's cache does not support of vLLM.

    Raises:
        UnsupportedModelError: with all that is in the way.
    """
    check_version(options)
    parallel, scheduler = config.parallel_config, config.scheduler_config
    device = config.device_config.device.type
    found = {
        "the hybrid KV cache manager is off (take --disable-hybrid-kv-cache-manager away)": bool(
            # A connector switches it off by itself.
            scheduler.disable_hybrid_kv_cache_manager and config.kv_transfer_config is None
        ),
        "a KV connector is set (--kv-transfer-config)": config.kv_transfer_config is not None,
        "tensor, pipeline or context parallelism is on": parallel.world_size > 1
        or parallel.decode_context_parallel_size > 1
        or parallel.prefill_context_parallel_size > 1,
        "speculative decoding is on": config.speculative_config is not None,
        "LoRA is on": config.lora_config is not None,
        f"--kv-cache-dtype is {config.cache_config.cache_dtype} (leave it auto)": config.cache_config.cache_dtype
        != "auto",
        "the weights are quantised": config.model_config.quantization is not None,
        f"it runs on {device}, which was not tested (set allow_untested to try)": device != "cpu"
        and not options.allow_untested,
    }
    reasons = [reason for reason, there in found.items() if there]
    if reasons:
        raise UnsupportedModelError(f"kvcar's cache in vLLM cannot be used: {'; '.join(reasons)}")


def check_prompts_fit(config: Any, tokens: int) -> None:
    """Refuse passes of so few ``tokens`` that vLLM, told not to cut prompts, would let long ones wait for ever.

    Raises:
        UnsupportedModelError: chunked prefill is off, and ``max_model_len`` is more.
    """
    longest = config.model_config.max_model_len
    if not config.scheduler_config.enable_chunked_prefill and tokens < longest:
        raise UnsupportedModelError(
            f"with --no-enable-chunked-prefill a prompt of more than the {tokens} tokens of a pass would wait for ever; take it away, "
            f"or set max_num_batched_tokens in kvcar's options to at least max_model_len, {longest}"
        )


def check_bundle(bundle: Bundle, options: Options) -> None:
    """Refuse plans that leave layers exact or code a window, for which vLLM would need more groups; raises PlanError."""
    plan = bundle.plan
    if plan.geometry.windowed_layers:
        raise PlanError(
            f"{options.bundle} is for a model whose layers {list(plan.geometry.windowed_layers)[:4]}... attend to a window of their "
            "own, which is not supported in vLLM; use it in transformers"
        )
    left = set(range(plan.geometry.layers)) - set(plan.coded_layers)
    if left:
        raise PlanError(
            f"the plan of {options.bundle} keeps layers {sorted(left)} as they are, which is not supported in vLLM; fit a bundle "
            "that codes all layers"
        )


def check_layers(layers: Mapping[str, Any], bundle: Bundle) -> None:
    """Refuse a model whose attention layers are not those of the bundle; raises ModelMismatchError or UnsupportedModelError."""
    wanted = bundle.plan.geometry
    if not layers:
        raise UnsupportedModelError("the model has no attention layers that kvcar knows")
    indices = sorted(_index(name) for name in layers)
    if indices != list(range(wanted.layers)):
        raise ModelMismatchError(
            f"the bundle is for {wanted.layers} layers, and vLLM has attention in layers {indices[:8]}... ({len(indices)} in all)"
        )
    for name, layer in layers.items():
        shape = (layer.num_kv_heads, layer.num_heads, layer.head_size, layer.head_size_v)
        expected = (wanted.kv_heads, wanted.query_heads, wanted.head_dim, wanted.head_dim)
        if shape != expected:
            raise ModelMismatchError(
                f"{name} has (KV heads, query heads, key dim, value dim) {shape}, the bundle is for {expected}; use the "
                "bundle's model, or fit a bundle for this one"
            )


def _index(name: str) -> int:
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    if len(numbers) != 1:
        raise InputError(f"the layer {name} has no single number in its name, so its place is not known")
    return numbers[0]
