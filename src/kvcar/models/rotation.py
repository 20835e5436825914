"""Learning how each layer of a model rotates its keys, from what the model computes rather than from its family.

Where every token of a window is the same, attention is an average of equal values, so all tokens have the same hidden state in
every layer: their keys before RoPE are equal, and after RoPE they differ by rotation alone. So a guess (angles from a
rotary module that ran, a pairing of elements, a direction) is right exactly if it makes the window's keys equal. Where other layers
(linear attention, convolutions) tell equal tokens apart, the window is run once more at later positions: rotated keys make
attention depend on distances alone, so a right guess makes the keys of the two runs equal.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..geometry import KVGeometry
from ..kernels.rotary import RotaryStyle, RotaryTable
from .structure import DecoderParts, cache_argument, evaluating, find_decoder
from .watching import WatchingCache
from .weights import device_of

_log = logging.getLogger("kvcar.models")

_WINDOW_TOKENS = 16
_PROBE_POSITIONS = (0, 1, 100)
_TOLERANCE = 1e-4
# Share of a key's size that may depend on the position after the right rotation is taken back. Rounding through many layers
# of a 16-bit model leaves a few hundredths.
_LARGEST_REST = 0.1
# A rest that rounding alone may leave; with more, something other than rotation tells equal tokens apart.
_RIGHT_REST = 0.02
_LATER = 37
# A guess counts as good as the best one within this factor: then the simpler one, or the module's own, is taken.
_AS_GOOD = 3.0


class Rotation(NamedTuple):
    """One guess: angles per position, a factor, and which elements turn together."""

    inverse_frequency: Tensor
    attention_scale: float
    style: RotaryStyle


def learn_rotations(model: PreTrainedModel, geometry: KVGeometry) -> dict[int, RotaryTable]:
    """Find the rotation of every layer that may be coded; one pass over a window of a repeated token.

    Args:
        model: a causal language model; it is only run.
        geometry: its cache.

    Returns:
        A table for each layer whose keys rotate; layers with the same rotation share one. A layer that is left out does
        not rotate its keys, or does so in a way that cannot be undone (the log says which): its keys are coded as they are.
    """
    return look_at_rotations(model, geometry)[0] if geometry.rotary else {}


@torch.no_grad()
def look_at_rotations(
    model: PreTrainedModel, geometry: KVGeometry, **beside: Tensor
) -> tuple[dict[int, RotaryTable], Tensor]:
    """Do what ``learn_rotations`` does in one pass with other sequences.

    Args:
        model: a causal language model; it is only run.
        geometry: its cache.
        beside: what the model is given of the other sequences, whose own cache is empty: ``input_ids`` ``[B, T]`` and more.

    Returns:
        The tables, none where nothing rotates, and the logits ``[B, T, V]`` of the other sequences.
    """
    parts = find_decoder(model)
    length = beside["input_ids"].shape[1] if beside else min(_WINDOW_TOKENS, geometry.max_positions)
    window = _window(length, device_of(model))
    # Where a model takes nothing but token ids it is given nothing else.
    given = {name: torch.cat([other, window[name]]) for name, other in beside.items()} or {
        "input_ids": window["input_ids"]
    }
    seen = _watched_pass(model, parts, geometry, given)
    tables = _tables(seen, _LaterPass(model, parts, geometry)) if geometry.rotary else {}
    return tables, seen.logits[:-1]


def _window(length: int, device: torch.device) -> dict[str, Tensor]:
    """One sequence of one repeated token, and all that a model may be given about it."""
    same = torch.ones(1, length, dtype=torch.int64, device=device)
    return {"input_ids": same, "attention_mask": same, "position_ids": torch.arange(length, device=device)[None]}


def _tables(seen: _Seen, later: _LaterPass) -> dict[int, RotaryTable]:
    """The table of each layer whose keys rotate."""
    device = next((side.device for side in seen.keys.values()), None)
    guesses = {call: _guesses_of(*call_parts, device) for call, call_parts in seen.calls.items()}
    tables: dict[tuple[bytes, float, str], RotaryTable] = {}
    found: dict[int, RotaryTable] = {}
    for layers, call in _alike(seen.keys, seen.own):
        ordered = [*guesses.get(call, ()), *(g for each in guesses for g in guesses[each] if each != call)]
        options: list[Rotation | None] = [None, *ordered]
        side = torch.stack([seen.keys[layer] for layer in layers])
        rests = torch.stack([_rests_of(option, side) for option in options])
        for place, layer in enumerate(layers):
            rotation = _best_of(layer, seen.keys[layer], options, rests[:, place].tolist(), later)
            if rotation is not None:
                key = (rotation.inverse_frequency.cpu().numpy().tobytes(), rotation.attention_scale, rotation.style)
                if key not in tables:
                    tables[key] = RotaryTable(*rotation)
                found[layer] = tables[key]
    return found


def _alike(keys: Mapping[int, Tensor], own: Mapping[int, str]) -> list[tuple[list[int], str]]:
    """Layers whose keys have one shape and whose attention was given the same angles, to be looked at together."""
    groups: dict[tuple[str, torch.Size], list[int]] = {}
    for layer, side in keys.items():
        groups.setdefault((own.get(layer, ""), side.shape), []).append(layer)
    return [(layers, call) for (call, _), layers in groups.items()]


_Call = tuple[nn.Module, tuple[Any, ...], Mapping[str, Any]]
"""A rotary module and the arguments that chose what it computed."""


class _Seen(NamedTuple):
    """What is seen of a pass over an empty cache.

    Attributes:
        keys: by layer, those of the last sequence after RoPE, ``[H, T, D]``.
        calls: what rotary modules were called with, by a name of the call.
        own: by layer, the name of the call whose (cos, sin) its attention was given, where that can be seen.
        logits: ``[B, T, V]``.
    """

    keys: dict[int, Tensor]
    calls: dict[str, _Call]
    own: dict[int, str]
    logits: Tensor


def _watched_pass(
    model: PreTrainedModel, parts: DecoderParts, geometry: KVGeometry, given: Mapping[str, Tensor]
) -> _Seen:
    """Run sequences once, on the other arguments that are ``given``."""
    keys: dict[int, Tensor] = {}
    calls: dict[str, _Call] = {}
    own: dict[int, str] = {}
    outputs: dict[int, tuple[Tensor, str]] = {}

    def note_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if isinstance(output, tuple) and len(output) == 2 and isinstance(output[0], Tensor):
            chosen = (
                tuple(a for a in args if isinstance(a, str)),
                {k: v for k, v in kwargs.items() if isinstance(v, str)},
            )
            name = f"{id(module)} {chosen}"
            calls[name] = (module, *chosen)
            outputs[id(output[0])] = (output[0], name)

    def note_use(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del args
        given = kwargs.get("position_embeddings")
        if isinstance(given, tuple) and id(given[0]) in outputs:
            own.update(dict.fromkeys(parts.readers[module], outputs[id(given[0])][1]))

    def take(layer: int, layer_keys: Tensor, values: Tensor) -> None:
        del values
        keys[layer] = layer_keys[-1]

    rotary = [m for m in parts.decoder.modules() if "rotary" in type(m).__name__.lower()]
    handles = [m.register_forward_hook(note_call, with_kwargs=True) for m in rotary]
    handles += [m.register_forward_pre_hook(note_use, with_kwargs=True) for m in parts.readers]
    try:
        with evaluating(model):
            cache = WatchingCache(model.config, geometry, take, parts.device)
            output = model(**given, **cache_argument(model, cache), use_cache=True)
    finally:
        for handle in handles:
            handle.remove()
    return _Seen(keys, calls, own, output.logits)


class _LaterPass:
    """Keys of a window at two places, run when they are first asked for."""

    def __init__(self, model: PreTrainedModel, parts: DecoderParts, geometry: KVGeometry) -> None:
        self._run = partial(_watched_pass, model, parts, geometry)
        places = torch.arange(_WINDOW_TOKENS, device=device_of(model))[None]
        self._ids = 1 + places * 7919 % max(1, model.config.get_text_config(decoder=True).vocab_size - 8)
        self._keys: list[dict[int, Tensor]] | None = None
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters

    def of(self, layer: int) -> list[tuple[Tensor, int]]:
        """Keys after RoPE ``[H, T, D]`` and the position of the first, of both runs; none where positions cannot be chosen."""
        if not self._takes_positions:
            return []
        if self._keys is None:
            places = torch.arange(_WINDOW_TOKENS, device=self._ids.device)[None]
            runs = [self._run({"input_ids": self._ids, "position_ids": first + places}) for first in (0, _LATER)]
            self._keys = [run.keys for run in runs]
        return [(keys[layer], first) for keys, first in zip(self._keys, (0, _LATER), strict=True)]


def _rests_of(guess: Rotation | None, keys: Tensor) -> Tensor:
    """What a guess leaves of the differences between keys ``[L, H, T, D]`` of equal tokens, root mean square, ``[L]``."""
    back = _turned_back(guess, keys, 0)
    return (back - back.mean(2, keepdim=True)).square().mean((1, 2, 3)).sqrt()


def _best_of(
    layer: int, keys: Tensor, options: list[Rotation | None], rests: list[float], later: _LaterPass
) -> Rotation | None:
    """The guess that makes the keys ``[H, T, D]`` of equal tokens equal, or those of one text at two places; None for no rotation."""
    size = float(keys.float().square().mean().sqrt())
    if not math.isfinite(min(rests) + size):
        return None  # whoever runs the model refuses NaN with a better message
    pair = later.of(layer) if min(rests) > _RIGHT_REST * size and len(options) > 1 else []
    if pair:
        backs = [[_turned_back(option, own[None], first) for own, first in pair] for option in options]
        rests = [float((first - second).square().mean().sqrt()) for first, second in backs]
        size = float(pair[0][0].float().square().mean().sqrt())
    best = min(rests)
    if best > _LARGEST_REST * size:
        _log.warning(
            "keys of layer %d depend on the position in a way that kvcar cannot take back (%.0f %% of their size remains); "
            "they are coded as they are, which takes more bits",
            layer,
            100 * best / max(size, 1e-12),
        )
        return None
    return next(o for o, left in zip(options, rests, strict=True) if left <= max(_AS_GOOD * best, 1e-6 * size))


def _turned_back(guess: Rotation | None, keys: Tensor, first: int) -> Tensor:
    """Keys ``[L, H, T, D]`` from position ``first`` on as they were before a rotation."""
    if guess is None:
        return keys.float()
    positions = torch.arange(first, first + keys.shape[2], device=keys.device)
    return RotaryTable(*guess).unrotate(keys, positions[None].expand(len(keys), -1))


def _guesses_of(
    module: nn.Module, extra: tuple[Any, ...], named: Mapping[str, Any], device: torch.device | None
) -> list[Rotation]:
    """What a rotary module may do to keys, on the device that these are on: its own pairing first, then the other one, then both turned backwards."""
    found = _angles_of(module, extra, named)
    if found is None:
        return []
    frequency, scale, style = found
    frequency = frequency.to(device)
    styles: tuple[RotaryStyle, ...] = ("half", "interleaved") if style == "half" else ("interleaved", "half")
    return [Rotation(sign * frequency, scale, each) for sign in (1, -1) for each in styles]


def _angles_of(module: nn.Module, extra: tuple[Any, ...], named: Mapping[str, Any]) -> Rotation | None:
    """Frequencies behind a module's (cos, sin): the buffer of its own that, times the position, gives its angles."""
    buffers = [b for n, b in module.named_buffers() if "inv_freq" in n and "original" not in n]
    if not buffers:
        return None
    device = buffers[0].device
    positions = torch.tensor([_PROBE_POSITIONS], device=device)
    # `forward` itself, so that the probing call does not come back through hooks.
    cos, sin = module.forward(torch.zeros(1, device=device, dtype=torch.float32), positions, *extra, **named)
    pairs = _once_each(cos[0].double(), sin[0].double())
    if pairs is None:
        return None
    style, cos, sin = pairs
    scale = float(cos[0, 0])
    for buffer in buffers:
        frequency = buffer.double()
        if frequency.shape != cos.shape[1:]:
            continue
        angles = positions[0, :, None] * frequency
        same = [torch.allclose(f(angles) * scale, c, atol=_TOLERANCE) for f, c in ((torch.cos, cos), (torch.sin, sin))]
        if all(same):
            return Rotation(frequency, scale, style)
    return None


def _once_each(cos: Tensor, sin: Tensor) -> tuple[RotaryStyle, Tensor, Tensor] | None:
    """The pairing that repeated angles suggest, and cos and sin once for each pair ``[positions, F]``."""
    half = cos.shape[-1] // 2
    if torch.equal(cos[:, :half], cos[:, half:]):
        return "half", cos[:, :half], sin[:, :half]
    if torch.equal(cos[:, 0::2], cos[:, 1::2]):
        return "interleaved", cos[:, 0::2], sin[:, 0::2]
    return None
