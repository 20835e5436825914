# pyright: reportMissingImports=false
"""Making the cache when vLLM has loaded its model: the bundle is read and checked, the layer of codes takes its place."""

from __future__ import annotations

import logging
from typing import Any

from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index

from ...bundle import Bundle
from ...cache.coder import PageCoder
from .checks import check_bundle, check_config, check_layers, check_prompts_fit
from .codes import CODES_LAYER, Codes, RealLayer, in_order
from .model import check_weights, rotation_of
from .options import Options, options_of
from .sizes import BlockSizes, CacheShape, choose_blocks
from .specs import limit_batch

_log = logging.getLogger("vllm.kvcar")


def start(config: Any, backend: type, codes_backend: type) -> None:
    """Put kvcar's cache in the place of vLLM's, in this process.

    Args:
        config: vLLM's, with the model's layers in its static forward context.
        backend: class that layers' backends are made of.
        codes_backend: the backend of the layer of codes.

    Raises:
        KVCarError: something is not supported, or the bundle is not the model's.
    """
    options = options_of(config)
    check_config(config, options)
    bundle = Bundle.from_pretrained(options.bundle)
    context = config.compilation_config.static_forward_context
    attention = {name: layer for name, layer in context.items() if isinstance(layer, Attention)}
    check_bundle(bundle, options)
    check_layers(attention, bundle)
    check_weights(bundle, config.model_config)
    dtype = config.model_config.dtype
    _limit_batch(config, options, bundle)
    coder = PageCoder(bundle, config.device_config.device, dtype)
    rotary = rotation_of(config.model_config.hf_config, bundle.plan.geometry)
    sizes = _sizes(config, bundle, coder)
    layers = [RealLayer(name, extract_layer_index(name), layer, rotary) for name, layer in attention.items()]
    tokens = config.scheduler_config.max_num_batched_tokens
    ordered = in_order(layers)
    for place, layer in enumerate(ordered.values()):
        own = {"shape": sizes.shape, "window_tokens": sizes.window_tokens(place), "tokens_of_a_pass": tokens}
        layer.module.attn_backend = type("KVCarWindowBackend", (backend,), own)
    context[CODES_LAYER] = Codes(coder, sizes, ordered, dtype, codes_backend)
    _log_active(bundle, options, sizes, config)


def _limit_batch(config: Any, options: Options, bundle: Bundle) -> None:
    """Lower the tokens of a pass, which vLLM reserves exact memory for in every sequence."""
    asked = options.max_num_batched_tokens or max(bundle.plan.window, bundle.plan.page_tokens)
    given = config.scheduler_config.max_num_batched_tokens
    check_prompts_fit(config, min(asked, given))
    if not limit_batch(config.scheduler_config, asked):
        return
    _log.warning(
        "kvcar: max_num_batched_tokens is %d instead of %d, as each sequence reserves exact memory for so many tokens, and "
        "with more than %d results depend on where a prompt is cut; it is also the most requests at a time; set "
        "max_num_batched_tokens in kvcar's own options to choose",
        asked, given, max(bundle.plan.window, 1),
    )  # fmt: skip


def _sizes(config: Any, bundle: Bundle, coder: PageCoder) -> BlockSizes:
    plan = bundle.plan
    shape = CacheShape(
        layers=plan.geometry.layers,
        layer_bytes=plan.geometry.layer_elements_per_token * config.model_config.dtype.itemsize,
        page_tokens=plan.page_tokens,
        page_bytes=coder.layouts[0].page_bytes,
        window=plan.window,
        sinks=plan.sinks,
    )
    return choose_blocks(shape, config.model_config.max_model_len, config.max_in_flight_tokens)


def _log_active(bundle: Bundle, options: Options, sizes: BlockSizes, config: Any) -> None:
    shape, tokens = sizes.shape, config.model_config.max_model_len
    stock = shape.exact_bytes * tokens
    own = sizes.sequence_bytes(tokens, config.max_in_flight_tokens)
    windows = " and ".join(f"{each.tokens} of {each.layers} layers" for each in sizes.windows)
    _log.info(
        "kvcar is active: bundle %s (%s), a page of %d tokens takes %d bytes of a block of %d, whose exact tokens are %s, in %d "
        "groups; a sequence of %d tokens takes %.1f MB instead of %.1f, so %.2f times as many fit; prefix hits end at multiples "
        "of %d tokens",
        options.bundle, bundle.digest[:12], shape.page_tokens, shape.page_bytes, sizes.block_bytes, windows, sizes.groups,
        tokens, own / 1e6, stock / 1e6, stock / own, sizes.hit_step,
    )  # fmt: skip
