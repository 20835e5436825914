"""The shape of a model's KV cache: from its config alone, or, exactly, from what the model does with a cache."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import UnsupportedModelError
from ..geometry import KVGeometry
from .structure import LayerKind, LayerShape, find_decoder, kind_of, own_cache_layers

# Their angles change with the length of the sequence, so that stored keys are not rotated back but coded as they are.
_UNSTABLE_ROPE = ("dynamic", "longrope")
_POSITIONS = (
    "max_position_embeddings", "n_positions", "max_seq_len", "model_max_length", "max_target_positions", "max_sequence_length", "n_ctx",
)  # fmt: skip
FEWEST_WINDOW_TOKENS = 512
"""Tokens of the smallest window whose layers are compressed: sinks and recent tokens stay exact, and are most of a smaller one."""
_INSTEAD = "run it with its own cache"
_NO_LIMIT = 1 << 20
"""Positions of a model whose config names no limit (ALiBi, or none at all)."""


def read_geometry(config: PreTrainedConfig) -> KVGeometry:
    """Read the geometry of the cache of a causal language model from its config alone.

    Raises:
        UnsupportedModelError: nothing of its cache can be compressed, or the config does not say how large its heads are.
    """
    kind = type(config).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{kind} is an encoder-decoder; kvcar compresses the cache of decoder-only models")
    text = config.get_text_config(decoder=True)
    with_latents = _with_latents(text)
    if with_latents is not None:
        raise UnsupportedModelError(f"the cache of {kind} {_mla_in_words(with_latents)}; {_INSTEAD}")
    layers = own_cache_layers(config)
    kinds: list[LayerKind] = [kind_of(layer) for layer in layers]
    windows = {index: layer.sliding_window for index, layer in enumerate(layers) if kinds[index] == "sliding"}
    shapes = {index: _shape(text, index) for index, each in enumerate(kinds) if each != "own"}
    return _geometry(kind, text, kinds, windows, shapes, {})


def geometry_of(model: PreTrainedModel) -> KVGeometry:
    """Find the geometry of a model's cache by looking at what it does with one.

    Raises:
        UnsupportedModelError: as ``find_decoder``; or nothing of the cache can be compressed, with the reasons.
    """
    parts = find_decoder(model)
    text = model.config.get_text_config(decoder=True)
    reasons = parts.reasons
    with_latents = _with_latents(text)
    if with_latents is not None:
        reasons = dict.fromkeys(reasons, _mla_in_words(with_latents))
    return _geometry(type(model).__name__, text, parts.kinds, parts.windows, parts.shapes, reasons)


def _geometry(
    name: str,
    text: PreTrainedConfig,
    kinds: Iterable[LayerKind],
    windows: Mapping[int, int],
    shapes: Mapping[int, LayerShape],
    reasons: Mapping[int, str],
) -> KVGeometry:
    """Put together what is known by layer.

    Layers that may be compressed have heads alike; where they differ, those that take the most bytes are chosen, and the others stay the
    model's own.
    """
    kinds = list(kinds)
    full = {layer: shapes[layer] for layer, kind in enumerate(kinds) if kind == "full" and layer in shapes}
    sliding = {layer: windows[layer] for layer in windows if layer in shapes}
    if not full and not sliding:
        raise UnsupportedModelError(
            f"{name} has nothing that kvcar could compress: {_in_words(kinds, reasons)}; {_INSTEAD}"
        )
    shape = _largest(full.values()) if full else _largest(shapes[layer] for layer in sliding)
    window = Counter(sliding.values()).most_common(1)[0][0] if sliding else 0
    codable = {layer for layer, own in full.items() if own == shape}
    kept_sliding = {layer for layer, own in sliding.items() if own == window}
    windowed = {layer for layer in kept_sliding if window >= FEWEST_WINDOW_TOKENS and shapes[layer] == shape}
    elements = [0 if layer not in shapes else _elements(shapes[layer]) for layer in range(len(kinds))]
    alike = set(elements) == {2 * shape.kv_heads * shape.key_dim}
    return KVGeometry(
        layers=len(kinds),
        kv_heads=shape.kv_heads,
        query_heads=shape.query_heads,
        head_dim=shape.key_dim,
        rotary=_is_rotary(text),
        max_positions=_positions(text),
        sliding_layers=tuple(sorted(kept_sliding - windowed)),
        windowed_layers=tuple(sorted(windowed)),
        sliding_window=window,
        chunked=bool(windowed) and _is_chunked(text, min(windowed)),
        own_layers=tuple(layer for layer in range(len(kinds)) if layer not in codable | kept_sliding),
        layer_elements=() if alike else tuple(elements),
    )


def _is_chunked(text: PreTrainedConfig, layer: int) -> bool:
    """Whether a layer that attends to a window attends to chunks that follow each other."""
    types = getattr(text, "layer_types", None) or ()
    if layer < len(types):
        return types[layer] == "chunked_attention"
    return getattr(text, "sliding_window", None) is None and getattr(text, "attention_chunk_size", None) is not None


def _with_latents(text: PreTrainedConfig) -> PreTrainedConfig | None:
    """The config of the first layer that has multi-head latent attention; configs may differ by layer. None where none has."""
    by_layer = getattr(text, "per_layer_config", None) or [text]
    return next((own for own in by_layer if getattr(own, "kv_lora_rank", None) is not None), None)


def _elements(shape: LayerShape) -> int:
    return shape.kv_heads * (shape.key_dim + shape.value_dim)


def _largest(shapes: Iterable[LayerShape]) -> LayerShape:
    """The shape whose layers take the most together."""
    counts = Counter(shapes)
    return max(counts, key=lambda shape: counts[shape] * _elements(shape))


def _in_words(kinds: list[LayerKind], reasons: Mapping[int, str]) -> str:
    """Why no layer can be compressed; layers of one reason together."""
    layers: dict[str, list[int]] = {}
    for layer, reason in sorted(reasons.items()):
        layers.setdefault(reason, []).append(layer)
    said = [
        f"{'layer' if len(own) == 1 else 'each of layers'} {_listed(own)} {reason}"
        for reason, own in list(layers.items())[:2]
    ]
    others = [layer for layer, kind in enumerate(kinds) if kind == "own" and layer not in reasons]
    if others:
        said.append(f"{len(others)} of {len(kinds)} layers keep states of a fixed size, or nothing")
    return "; ".join(said) or "no layer keeps keys and values"


def _listed(layers: list[int]) -> str:
    """A few layers by number, and how many more there are."""
    more = f" and {len(layers) - 4} more" if len(layers) > 4 else ""
    return ", ".join(map(str, layers[:4])) + more


def _mla_in_words(own: PreTrainedConfig) -> str:
    """What a cache of latents holds, and how much less it is than keys and values would be."""
    said = "holds latents in place of keys and values (MLA)"
    names = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "num_attention_heads")
    sizes = [size for size in (getattr(own, name, None) for name in names) if isinstance(size, int)]
    if len(sizes) < len(names):
        return f"{said}, already a fraction of what those would take"
    rank, rotated, plain, value, heads = sizes
    return f"{said}, {rank + rotated:,} elements a token where those would take {heads * (rotated + plain + value):,}"


def _shape(text: PreTrainedConfig, layer: int) -> LayerShape:
    """The heads of one layer as its config has them."""
    own = _layer_config(text, layer)
    query_heads = _single(own, "num_attention_heads")
    shared = getattr(own, "multi_query", False) is True and getattr(own, "new_decoder_architecture", False) is not True
    default = 1 if shared else query_heads
    kv_heads = default if shared else _single(own, "num_key_value_heads", getattr(own, "num_kv_heads", None) or default)
    head_dim = _single(own, "head_dim", _single(own, "hidden_size") // query_heads)
    return LayerShape(kv_heads, head_dim, head_dim, query_heads)


def _single(config: PreTrainedConfig, name: str, default: int | None = None) -> int:
    """A config value that must be one whole number."""
    value = getattr(config, name, None)
    value = default if value is None else value
    if type(value) is not int or value < 1:
        raise UnsupportedModelError(
            f"{type(config).__name__}.{name} is {value!r}; kvcar needs one positive whole number for all layers"
        )
    return value


def _layer_config(config: PreTrainedConfig, layer: int) -> PreTrainedConfig:
    """What holds for one layer, in versions of transformers where configs may differ by layer."""
    by_layer = getattr(config, "per_layer_config", None)
    return config if by_layer is None else by_layer[layer]


def _positions(text: PreTrainedConfig) -> int:
    """Positions that the model was built for."""
    named = (getattr(text, name, None) for name in _POSITIONS)
    return next((value for value in named if type(value) is int and value > 0), _NO_LIMIT)


def _is_rotary(config: PreTrainedConfig) -> bool:
    """Whether keys are rotated by angles that stay the same however long the text becomes."""
    rope = getattr(config, "rope_parameters", None)
    if not rope:
        return False
    # Either one set of parameters, or one for each kind of layer.
    each = [rope] if "rope_type" in rope else [part for part in rope.values() if isinstance(part, dict)]
    return not {str(part.get("rope_type")) for part in each} & set(_UNSTABLE_ROPE)
