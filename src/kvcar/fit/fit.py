"""Fitting a bundle: capture once, solve block by block, hand back everything that a bundle holds."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from ..bundle import Bundle, CodedBlock, FitProvenance, identify
from ..errors import FitError, InputError
from ..models.geometry import read_geometry
from ..plan import BitGroup, Block, CacheConfig, Plan
from .blocks import regular_blocks, without
from .budget import bits_for
from ..progress import OnProgress, counter, silent
from ..geometry import Kind, KVGeometry, Slot
from ..version import __version__
from .capture import capture
from .effect import EffectProbe, damped, effect_metrics
from .moments import Moments
from .options import DEFAULT_TIMES_SMALLER, FitOptions
from .solvers import SOLVERS, Budget
from ..text import TextSource

Allocate = Callable[[Plan, Sequence[Moments], tuple[int, ...]], tuple[int, ...]]
"""(plan whose blocks are to be coded, their moments, an even share of latents for each) -> latents of each."""

_SAMPLE_TOKENS = 2048
_TRAINING_TOKENS = 8192


def fit_bundle(
    model: PreTrainedModel,
    name: str,
    windows: Tensor,
    source: TextSource,
    options: FitOptions | None = None,
    on_progress: OnProgress = silent,
    allocate: Allocate | None = None,
) -> Bundle:
    """Fit a bundle for ``model``.

    Args:
        model: a causal language model; it is only run, never changed.
        name: what to call it in the bundle.
        windows: token ids int64 ``[N, context]`` to fit on.
        source: where they come from, for provenance.
        options: see ``FitOptions``.
        on_progress: told what is going on.
        allocate: shares the latents that the options fix among blocks otherwise than evenly.

    Raises:
        FitError: NaN in the model, too little text, or a target out of reach.
        InputError: options that do not fit the model.
    """
    return fit_bundles(model, name, windows, source, [options or FitOptions()], on_progress, allocate)[0]


def fit_bundles(
    model: PreTrainedModel,
    name: str,
    windows: Tensor,
    source: TextSource,
    options: Sequence[FitOptions],
    on_progress: OnProgress = silent,
    allocate: Allocate | None = None,
) -> list[Bundle]:
    """Fit several bundles from one pass over the text, as ``fit_bundle`` does one.

    Options that partition the slots alike share their statistics.
    """
    geometry = read_geometry(model.config)
    blocks = [_partition(geometry, o) for o in options]
    sinks = max(o.sinks for o in options)
    _check_text(windows, sinks, blocks, options, geometry)
    needs = [b for b, o in zip(blocks, options, strict=True) if not _is_lossless(o)]
    distinct = list(dict.fromkeys(block for each in needs for block in each))
    training = any(o.codec == "autoencoder" for o in options)
    stats = _collect(model, geometry, windows, distinct, sinks, training, on_progress) if distinct else {}
    _attach_metrics(model, geometry, windows, stats, options, on_progress)
    print_, identity = identify(model, name)
    model_bytes = model.dtype.itemsize
    bundles = []
    for each, option in zip(blocks, options, strict=True):
        plan, coded = _solve(geometry, each, stats, option, model_bytes, on_progress, allocate)
        bundles.append(
            Bundle(plan, coded, print_, identity, provenance(windows, source, option.seed, option.as_dict()))
        )
    return bundles


def _partition(geometry: KVGeometry, options: FitOptions) -> list[tuple[Slot, ...]]:
    """Blocks of the slots that the options want coded."""
    blocks = regular_blocks(geometry, options.layers_per_block, options.heads_per_block)
    wanted = geometry.codable_layers if options.layers is None else options.layers
    unknown = sorted(set(wanted) - set(geometry.codable_layers))
    if unknown or (not wanted and not options.reuses):
        raise InputError(f"layers to compress must be among {list(geometry.codable_layers)}, got {list(wanted)}")
    left_out = {reuse.slot for reuse in options.reuses}
    left_out |= {slot for slot in geometry.slots() if slot.layer not in wanted}
    return without(blocks, left_out)


def _is_lossless(options: FitOptions) -> bool:
    """Whether blocks keep what they are given; the default of the identity codec."""
    return options.codec == "identity" and options.bits is None and options.times_smaller is None


def _check_text(
    windows: Tensor,
    sinks: int,
    blocks: Sequence[Sequence[tuple[Slot, ...]]],
    options: Sequence[FitOptions],
    geometry: KVGeometry,
) -> None:
    if windows.ndim != 2 or windows.numel() == 0:
        raise InputError(f"fitting needs windows of token ids, got shape {tuple(windows.shape)}; give it some text")
    if windows.shape[1] > geometry.max_positions:
        raise InputError(
            f"windows of {windows.shape[1]} tokens are longer than the model's {geometry.max_positions} positions"
        )
    usable = windows.shape[0] * max(0, windows.shape[1] - sinks)
    for each, option in zip(blocks, options, strict=True):
        width = max((len(block) for block in each), default=0) * geometry.head_dim
        if not _is_lossless(option) and usable < 2 * width:
            raise FitError(
                f"{usable} tokens are too few to fit blocks of {width} elements (needed: at least {2 * width}); give "
                "more text or tokens, or fewer layers per block"
            )


def _collect(
    model: PreTrainedModel,
    geometry: KVGeometry,
    windows: Tensor,
    blocks: Sequence[tuple[Slot, ...]],
    sinks: int,
    training: bool,
    on_progress: OnProgress,
) -> dict[tuple[Slot, ...], Moments]:
    """Moments of every block in one pass over the text."""
    total = windows.shape[0] * (windows.shape[1] - sinks)
    stride = max(1, total // (_TRAINING_TOKENS if training else _SAMPLE_TOKENS))
    moments = [Moments(len(block) * geometry.head_dim, stride) for block in blocks]
    count = counter(on_progress, "capture keys and values", total)
    count(0)
    for tokens in capture(model, geometry, windows, blocks, sinks, lambda index, x: moments[index].add(x)):
        count(tokens)
    return dict(zip(blocks, moments, strict=True))


def _attach_metrics(
    model: PreTrainedModel,
    geometry: KVGeometry,
    windows: Tensor,
    stats: dict[tuple[Slot, ...], Moments],
    options: Sequence[FitOptions],
    on_progress: OnProgress,
) -> None:
    """Tell each block's moments what errors in it cost, where the options ask for that."""
    lossy = [o for o in options if not _is_lossless(o)]
    asking = [o for o in lossy if o.metric == "effect"]
    if not asking:
        return
    if len(asking) != len(lossy) or len({(o.window, o.page_tokens, o.sinks) for o in asking}) > 1:
        raise InputError("bundles fitted together must share the metric, and with 'effect' window, pages and sinks")
    first = asking[0]
    count = max(1, round(first.effect_tokens / windows.shape[1]))
    spread = windows[:: max(1, len(windows) // count)][:count]
    probe = EffectProbe(
        model, geometry, first.sinks, CacheConfig(first.window, first.sinks, first.page_tokens).step_tokens, first.window, first.seed
    )
    metrics = effect_metrics(probe, spread, on_progress)
    dim = geometry.head_dim
    for slots, moments in stats.items():
        owners: list[tuple[int, Kind]] = list(dict.fromkeys((slot.layer, slot.kind) for slot in slots))
        parts, start = [], 0
        for owner in owners:
            heads = [s.head for s in slots if (s.layer, s.kind) == owner]
            columns = torch.cat([torch.arange(h * dim, (h + 1) * dim) for h in heads])
            covariance = moments.covariance[start : start + len(columns), start : start + len(columns)]
            parts.append(damped(metrics[owner][columns][:, columns], covariance))
            start += len(columns)
        moments.metrics = parts


def _solve(
    geometry: KVGeometry,
    blocks: Sequence[tuple[Slot, ...]],
    stats: dict[tuple[Slot, ...], Moments],
    options: FitOptions,
    model_bytes: int,
    on_progress: OnProgress,
    allocate: Allocate | None,
) -> tuple[Plan, tuple[CodedBlock, ...]]:
    lossless = _is_lossless(options)
    empty = Plan(
        geometry=geometry,
        blocks=tuple(Block(codec=options.codec, slots=block) for block in blocks),
        reuses=options.reuses,
        cache=CacheConfig(options.window, options.sinks, options.page_tokens),
        # Lossless bundles keep the model's own dtype: they are the noise floor of every measurement.
        exact_dtype="model" if lossless else "bfloat16",
    )
    if lossless:
        return empty, (CodedBlock(None, None),) * len(blocks)
    if not blocks:
        return empty, ()
    budget = _budget(empty, options, model_bytes)
    if allocate is not None:
        if budget.latents is None:
            raise InputError(
                "latents can be shared out only where their number is given: key_latents and value_latents"
            )
        budget = Budget(0, allocate(empty, [stats[block] for block in blocks], budget.latents))
    planned, coded = [], []
    for index, fitted in enumerate(SOLVERS[options.codec](blocks, stats, budget, options)):
        planned.append(fitted.block)
        coded.append(CodedBlock(fitted.codec, fitted.quantizer))
        on_progress(f"fit {options.codec} codecs", index + 1, len(blocks))
    return empty.model_copy(update={"blocks": tuple(planned)}), tuple(coded)


def _budget(plan: Plan, options: FitOptions, model_bytes: int) -> Budget:
    """What all blocks together may spend."""
    if options.key_latents is not None and options.value_latents is not None:
        return Budget(0, tuple(_latents(block, plan.geometry, options) for block in plan.blocks))
    if options.bits is not None:
        elements = sum(len(block.slots) for block in plan.blocks) * plan.geometry.head_dim
        return Budget(int(options.bits * elements))
    if options.scales == "dynamic":
        # The scales' bytes are part of what is fixed, not of what latents may spend.
        scaled = BitGroup(bits=options.latent_bits, count=1)
        blocks = tuple(b.model_copy(update={"groups": (scaled,), "scales": "dynamic"}) for b in plan.blocks)
        plan = plan.model_copy(update={"blocks": blocks})
    return Budget(bits_for(plan, options.times_smaller or DEFAULT_TIMES_SMALLER, model_bytes))


def _latents(block: Block, geometry: KVGeometry, options: FitOptions) -> int:
    """A block's share of the latents asked for a whole layer."""
    per_kind = {"key": options.key_latents, "value": options.value_latents}
    latents = sum(per_kind[slot.kind] or 0 for slot in block.slots) / geometry.kv_heads
    width = len(block.slots) * geometry.head_dim
    if latents > width:
        raise InputError(f"{latents:g} latents are more than the {width} elements of a block; ask for fewer")
    return max(1, round(latents))


def provenance(
    windows: Tensor, source: TextSource, seed: int, options: dict[str, str | int | float | bool | None]
) -> FitProvenance:
    """What a bundle tells of how it was fitted."""
    return FitProvenance(
        kvcar_version=__version__,
        torch_version=torch.__version__,
        transformers_version=transformers.__version__,
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        text=source.name,
        text_sha256=source.sha256,
        tokens=windows.numel(),
        context=windows.shape[1],
        seed=seed,
        options=options,
    )
