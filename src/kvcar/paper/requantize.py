"""Changing a finished bundle: fewer layers, or other bits for the latents of the codecs it has."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..bundle import Bundle, CodedBlock
from ..codecs import DynamicQuantizer
from ..errors import InputError
from ..plan import BitGroup, Block, Scales
from ..fit.capture import capture
from ..fit.moments import Moments
from ..fit.quantize import fit_quantizer

_SAMPLE_TOKENS = 4096


def keep_layers(bundle: Bundle, layers: Collection[int]) -> Bundle:
    """The bundle with only the blocks and reuses of ``layers``; the others become exact.

    Raises:
        InputError: a block spans kept and dropped layers, or nothing is left.
    """
    kept: list[tuple[Block, CodedBlock]] = []
    for block, coded in zip(bundle.plan.blocks, bundle.blocks, strict=True):
        inside = {slot.layer in layers for slot in block.slots}
        if len(inside) > 1:
            raise InputError(f"a block spans layers that are kept and layers that are not: {block.slots}")
        if inside == {True}:
            kept.append((block, coded))
    reuses = tuple(reuse for reuse in bundle.plan.reuses if reuse.slot.layer in layers)
    if not kept and not reuses:
        raise InputError(f"nothing of the bundle is in layers {sorted(layers)}")
    plan = bundle.plan.model_copy(update={"blocks": tuple(block for block, _ in kept), "reuses": reuses})
    # Copied plans are not validated again and must not keep what was derived from the old one.
    plan = type(plan).model_validate(plan.model_dump())
    return replace(bundle, plan=plan, blocks=tuple(coded for _, coded in kept))


@torch.no_grad()
def requantize(bundle: Bundle, model: PreTrainedModel, windows: Tensor, bits: int, scales: Scales) -> Bundle:
    """The same codecs with every latent stored in ``bits`` bits.

    Args:
        bundle: whose codecs stay.
        model: what it was fitted for.
        windows: token ids int64 ``[N, context]``, to fit static steps on; not read for dynamic ones.
        bits: 1 to 8.
        scales: "static" (a step per latent) or "dynamic" (the paper's, a step per token).

    Raises:
        InputError: bits out of range, or a lossless block.
    """
    if not 1 <= bits <= 8:
        raise InputError(f"latents are quantised to 1 to 8 bits, got {bits}")
    if any(coded.codec is None for coded in bundle.blocks):
        raise InputError("a lossless block has no latents to quantise")
    blocks = tuple(
        block.model_copy(update={"groups": (BitGroup(bits=bits, count=block.latents),), "scales": scales})
        for block in bundle.plan.blocks
    )
    if scales == "dynamic":
        coded = tuple(replace(each, quantizer=DynamicQuantizer(bits)) for each in bundle.blocks)
    else:
        coded = _with_static_steps(bundle, model, windows, blocks)
    plan = bundle.plan.model_copy(update={"blocks": blocks})
    return replace(bundle, plan=type(plan).model_validate(plan.model_dump()), blocks=coded)


def _with_static_steps(
    bundle: Bundle, model: PreTrainedModel, windows: Tensor, blocks: tuple[Block, ...]
) -> tuple[CodedBlock, ...]:
    bundle.check_model(model)
    plan = bundle.plan
    slots = [block.slots for block in blocks]
    stride = max(1, windows.numel() // _SAMPLE_TOKENS)
    moments = [Moments(len(each) * plan.geometry.head_dim, stride) for each in slots]
    for _ in capture(model, plan.geometry, windows, slots, plan.sinks, lambda index, x: moments[index].add(x)):
        pass
    coded = []
    for each, block, stats in zip(bundle.blocks, blocks, moments, strict=True):
        assert each.codec is not None
        coded.append(replace(each, quantizer=fit_quantizer(block.groups, each.codec.encode(stats.sample))))
    return tuple(coded)
