"""A model is believed after it was tried: a short run over lossless pages must say what the model's own cache says.

Whatever kvcar assumes of a model (that attention is causal, that nothing changes keys on their way, that masks mean padding)
goes wrong here in the open, before the first token of a user is computed.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from inspect import signature
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel

from ..bundle import Bundle, CodedBlock
from ..errors import KVCarError, UnsupportedModelError
from ..geometry import KINDS, Slot
from ..kernels.rotary import RotaryTable
from ..models.interface import base_of, switched
from ..models.rotation import learn_rotations, look_at_rotations
from ..models.structure import cache_argument, evaluating, find_decoder
from ..models.weights import device_of
from ..plan import Block, CacheConfig, Plan
from .attention import STAND_IN_PREFIX
from .cache import KVCarCache

_log = logging.getLogger("kvcar")

_CHUNKS_TOKENS = (11, 3, 1)
_LAST_TOKENS = 2
_PADDING_TOKENS = 3
_PAGE_TOKENS = 32
# No more than leave tokens for the pages.
_SINKS = 4
# Root mean square of what may differ, as a share of the logits': sums in another order, in the dtype that the model computes in.
_NOISE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.1}
# Where activations are rounded to few bits, sums in another order may round either way: so many times what that does to the model
# over its own cache is believed, and never more than this share.
_TIMES_ROUNDING, _MOST_NOISE = 3, 0.1
# Logits from here down say that a token is ruled out (room of the vocabulary that no token takes, those of images).
_RULED_OUT = -3e4

_tried: WeakKeyDictionary[nn.Module, set[tuple[object, ...]]] = WeakKeyDictionary()


@torch.no_grad()
def look_at(model: PreTrainedModel, bundle: Bundle) -> tuple[dict[int, RotaryTable], Tensor | None]:
    """Look at a model that is not attached: how its layers rotate, and what it says to the window of the trial.

    One pass serves both.

    Returns:
        The tables of ``learn_rotations``, and logits float32 ``[tokens, V]`` of everything but padding, the whole window run at
        once; None where this model and plan were tried before.

    Raises:
        UnsupportedModelError: the model cannot be run over its own cache, or computes NaN.
    """
    decoder = find_decoder(model).decoder
    # Not by flash or flex attention, which attached models do not use and which need not be there.
    with switched(decoder, base_of(decoder)):
        return _looked_at(model, bundle)


def _looked_at(model: PreTrainedModel, bundle: Bundle) -> tuple[dict[int, RotaryTable], Tensor | None]:
    geometry = bundle.plan.geometry
    tried = _key(model, bundle) in _tried.get(model, ())
    if tried or sum(_CHUNKS_TOKENS) > geometry.max_positions:  # or too short a model for pages to matter
        return learn_rotations(model, geometry), None
    window = _window(model)
    try:
        rotations, logits = look_at_rotations(model, geometry, **window)
    except KVCarError:
        raise
    except Exception as error:
        raise _not_over_own_cache(model, error) from error
    expected = logits.float()[window["attention_mask"].bool()]
    if not (torch.isfinite(expected) | (expected <= _RULED_OUT)).all():
        raise UnsupportedModelError(
            f"{type(model).__name__} computes NaN or infinity over its own cache; check the model's weights and dtype"
        )
    return rotations, expected


@torch.no_grad()
def check_against(model: PreTrainedModel, bundle: Bundle, expected: Tensor) -> None:
    """Run the same window over lossless pages and refuse a model that then says something else.

    Args:
        model: attached.
        bundle: what it is attached with; its codecs play no part here.
        expected: see ``look_at``.

    Raises:
        UnsupportedModelError: with what differs and by how much.
    """
    started = time.perf_counter()
    lossless = _lossless(bundle)
    got = _ran(model, partial(_logits, model, KVCarCache(lossless)))
    error, noise = _difference(got, expected), _NOISE[model.dtype]
    if not error <= noise:
        # Some models say something else as soon as they are run in chunks, whatever the cache (states, choices of experts).
        expected = _own_logits(model)
        error = _difference(got, expected)
    if not error <= noise:
        noise = max(noise, min(_TIMES_ROUNDING * _rounding(model, expected), _MOST_NOISE))
    if not error <= noise:
        raise UnsupportedModelError(
            f"{type(model).__name__} over lossless pages differs from its own cache: {100 * error:.2g} % of its logits' size, "
            f"where rounding in {model.dtype} explains {100 * noise:.2g} % ({_places(got, expected, noise)}). It does something with "
            "keys, values or masks that kvcar does not know, and is refused rather than answered wrongly"
        )
    _check_last(model, lossless, expected[-_LAST_TOKENS:], noise)
    _tried.setdefault(model, set()).add(_key(model, bundle))
    _log.info(
        "%s over lossless pages differs from its own cache by %.1g %% of its logits' size (%.2f s)",
        type(model).__name__, 100 * error, time.perf_counter() - started,
    )  # fmt: skip


def _check_last(model: PreTrainedModel, lossless: Bundle, expected: Tensor, noise: float) -> None:
    """Ask for the last logits alone, as ``generate`` does: layers that read the keys of others may then have fewer queries than keys."""
    parts = find_decoder(model)
    if len(parts.readers) == len(parts.attention) or "logits_to_keep" not in signature(model.forward).parameters:
        return
    got = _ran(model, partial(_last_logits, model, KVCarCache(lossless)))
    error = _difference(got, expected)
    if not error <= noise:
        raise UnsupportedModelError(
            f"{type(model).__name__} over lossless pages differs from its own cache where only the last {_LAST_TOKENS} logits are "
            f"asked for: {100 * error:.2g} % of their size, where rounding in {model.dtype} explains {100 * noise:.2g} %"
        )


def _ran(model: PreTrainedModel, run: Callable[[], Tensor]) -> Tensor:
    """What a run over a compressed cache gives; raises UnsupportedModelError where it fails."""
    try:
        return run()
    except KVCarError:
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not run over a compressed cache ({type(error).__name__}: {_first_line(error)})"
        ) from error


def _key(model: PreTrainedModel, bundle: Bundle) -> tuple[object, ...]:
    """What the trial depends on, but for weights."""
    plan, config = bundle.plan, model.config
    attention = str(config.get_text_config()._attn_implementation).removeprefix(STAND_IN_PREFIX)
    settings = config.to_json_string(use_diff=False).replace(STAND_IN_PREFIX, ""), attention
    causal = tuple(getattr(module, "is_causal", None) for module in model.modules())
    return plan.geometry, plan.coded_layers, plan.sinks, model.dtype, str(model.device), settings, causal


def _own_logits(model: PreTrainedModel) -> Tensor:
    """What ``_logits`` gives over the model's own cache."""
    try:
        return _logits(model, DynamicCache(config=model.config))
    except KVCarError:
        raise
    except Exception as error:
        raise _not_over_own_cache(model, error) from error


def _rounding(model: PreTrainedModel, expected: Tensor) -> float:
    """How far the model's own logits move where its embeddings move by about a unit in the last place."""
    draw = torch.Generator().manual_seed(0)

    def stir(module: nn.Module, args: tuple[object, ...], output: Tensor) -> Tensor:
        del module, args
        share = 2 * torch.rand(output.shape, generator=draw, dtype=torch.float32).to(output.device) - 1
        return (output.float() * (1 + 2 * torch.finfo(output.dtype).eps * share)).to(output.dtype)

    handle = model.get_input_embeddings().register_forward_hook(stir)
    try:
        return _difference(_own_logits(model), expected)
    finally:
        handle.remove()


def _not_over_own_cache(model: nn.Module, error: Exception) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{type(model).__name__} cannot be run over its own cache ({type(error).__name__}: {_first_line(error)}), so what a "
        "compressed cache would do to it cannot be checked"
    )


def _window(model: PreTrainedModel) -> dict[str, Tensor]:
    """What a model is given to say something to: two sequences, one of them padded."""
    total = sum(_CHUNKS_TOKENS)
    vocabulary = model.config.get_text_config().vocab_size
    places = torch.arange(2 * total, device=device_of(model)).view(2, total)
    # Without chance, and without the special tokens that stand first in most vocabularies.
    ids = (places * 7919 + 11) % max(vocabulary - 8, 1) + min(7, vocabulary - 1)
    mask = torch.ones_like(ids)
    mask[0, :_PADDING_TOKENS] = 0
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}


def _logits(model: PreTrainedModel, cache: Cache) -> Tensor:
    """Logits of the window but padding: a prefill in chunks, then a step."""
    window, start, parts = _window(model), 0, []
    mask = window.pop("attention_mask")
    with evaluating(model):
        for count in _CHUNKS_TOKENS:
            stop = start + count
            given = {name: side[:, start:stop] for name, side in window.items()} | {"attention_mask": mask[:, :stop]}
            parts.append(model(**given, **cache_argument(model, cache), use_cache=True).logits.float())
            start = stop
    return torch.cat(parts, dim=1)[mask.bool()]


def _last_logits(model: PreTrainedModel, cache: Cache) -> Tensor:
    """Logits ``[tokens, V]`` of the last tokens of the sequence without padding, run at once."""
    ids = _window(model)["input_ids"][1:]
    with evaluating(model):
        given = cache_argument(model, cache)
        return model(input_ids=ids, **given, use_cache=True, logits_to_keep=_LAST_TOKENS).logits[0].float()


def _lossless(bundle: Bundle) -> Bundle:
    """The bundle with every coded layer stored unchanged, in pages that take every token as soon as its pass is over."""
    geometry, layers = bundle.plan.geometry, bundle.plan.coded_layers
    slots: Sequence[tuple[Slot, ...]] = [
        tuple(Slot(layer, head, kind) for kind in KINDS for head in range(geometry.kv_heads)) for layer in layers
    ]
    config = CacheConfig(window=0, sinks=min(bundle.plan.sinks, _SINKS), page_tokens=_PAGE_TOKENS)
    blocks = tuple(Block(codec="identity", slots=own) for own in slots)
    plan = Plan(geometry=geometry, blocks=blocks, cache=config, exact_dtype="model")
    return replace(bundle, plan=plan, blocks=(CodedBlock(None, None),) * len(blocks))


def _difference(got: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of the logits about their mean; infinity where not the same ones are ruled out."""
    said = expected > _RULED_OUT
    if not torch.equal(got <= _RULED_OUT, ~said):
        return math.inf
    mean = expected.where(said, 0.0).sum(-1, keepdim=True) / said.sum(-1, keepdim=True)
    spread = (expected - mean)[said].square().mean().sqrt()
    return float((got - expected)[said].square().mean().sqrt() / spread.clamp_min(1e-12))


def _places(got: Tensor, expected: Tensor, noise: float) -> str:
    """Which tokens differ, in words: the first in the order of the padded sequence, then the other."""
    own = sum(_CHUNKS_TOKENS) - _PADDING_TOKENS
    wrong = [i for i in range(len(got)) if not _difference(got[i : i + 1], expected[i : i + 1]) <= noise]
    padded, plain = [i + _PADDING_TOKENS for i in wrong if i < own], [i - own for i in wrong if i >= own]
    parts = [
        f"{len(found)} tokens of the {name} sequence, from token {found[0]} on"
        for name, found in (("padded", padded), ("other", plain))
        if found
    ]
    return "; ".join(parts) or "all tokens a little"


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else "no message"
