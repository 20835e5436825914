"""The shape of a model's KV cache, read from its config alone."""

from __future__ import annotations

from transformers import PreTrainedConfig

from ..errors import UnsupportedModelError
from ..geometry import KVGeometry

# Their angles change with the length of the sequence, so stored keys could not be rotated back.
_UNSTABLE_ROPE = ("dynamic", "longrope")
_KNOWN_LAYERS = ("full_attention", "sliding_attention")


def read_geometry(config: PreTrainedConfig) -> KVGeometry:
    """Geometry of the cache of a causal language model.

    Raises:
        UnsupportedModelError: the model keeps something other than keys and values of plain or sliding attention,
            or keeps them in a shape that differs between layers.
    """
    kind = type(config).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{kind} is an encoder-decoder; kvcar compresses the cache of decoder-only models")
    text = config.get_text_config(decoder=True)
    if getattr(text, "kv_lora_rank", None) is not None:
        raise UnsupportedModelError(
            f"{kind} keeps latents instead of keys and values (MLA); its cache is small already"
        )
    sliding, window = _sliding_layers(text)
    layers = _single(text, "num_hidden_layers")
    query_heads = _single(text, "num_attention_heads")
    kv_heads = _single(text, "num_key_value_heads", query_heads)
    head_dim = _single(text, "head_dim", _single(text, "hidden_size") // query_heads)
    return KVGeometry(
        layers=layers,
        kv_heads=kv_heads,
        query_heads=query_heads,
        head_dim=head_dim,
        rotary=_is_rotary(text),
        max_positions=_single(text, "max_position_embeddings"),
        sliding_layers=sliding,
        sliding_window=window,
    )


def _single(config: PreTrainedConfig, name: str, default: int | None = None) -> int:
    """A config value that must be one whole number for all layers."""
    value = getattr(config, name, None)
    value = default if value is None else value
    if type(value) is not int or value < 1:
        raise UnsupportedModelError(
            f"{type(config).__name__}.{name} is {value!r}; kvcar needs one positive whole number for all layers"
        )
    return value


def _sliding_layers(config: PreTrainedConfig) -> tuple[tuple[int, ...], int]:
    """Layers that slide, and the tokens of their window."""
    kinds = _layer_kinds(config)
    unknown = sorted(set(kinds) - set(_KNOWN_LAYERS))
    if unknown:
        raise UnsupportedModelError(
            f"{type(config).__name__} has layers of kind {', '.join(unknown)}; kvcar knows {' and '.join(_KNOWN_LAYERS)}"
        )
    layers = tuple(index for index, kind in enumerate(kinds) if kind == "sliding_attention")
    windows = {_layer_config(config, layer).sliding_window for layer in layers}
    if len(windows) > 1:
        raise UnsupportedModelError(f"{type(config).__name__} has sliding windows of several sizes: {sorted(windows)}")
    return layers, int(windows.pop()) if windows else 0


def _layer_kinds(config: PreTrainedConfig) -> list[str]:
    """What kind of attention each layer has, as transformers names it."""
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        window, chunk = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
        kind = "sliding_attention" if window is not None else "chunked_attention" if chunk is not None else None
        kinds = [kind or "full_attention"] * _single(config, "num_hidden_layers")
    shared = getattr(config, "num_kv_shared_layers", None) or 0
    # Of the last layers where a model says how many; of any where it says so for each.
    modes = getattr(config, "kv_sharing_modes", None) or ["own"] * (len(kinds) - shared) + ["reuse"] * shared
    return ["keys and values of another layer" if m == "reuse" else k for k, m in zip(kinds, modes, strict=True)]


def _layer_config(config: PreTrainedConfig, layer: int) -> PreTrainedConfig:
    """What holds for one layer, in versions of transformers where configs may differ by layer."""
    by_layer = getattr(config, "per_layer_config", None)
    return config if by_layer is None else by_layer[layer]


def _is_rotary(config: PreTrainedConfig) -> bool:
    rope = getattr(config, "rope_parameters", None)
    if not rope:
        return False
    # Either one set of parameters, or one for each kind of layer.
    each = [rope] if "rope_type" in rope else [part for part in rope.values() if isinstance(part, dict)]
    unstable = {str(part.get("rope_type")) for part in each} & set(_UNSTABLE_ROPE)
    if unstable:
        raise UnsupportedModelError(
            f"{type(config).__name__} uses rotary positions of type {', '.join(sorted(unstable))}, whose angles change "
            "with the length of the sequence, so that stored keys cannot be rotated back"
        )
    return True
