"""The paper's int8 on the latents: other bits for the latents of finished codecs.

Source: KV-CAR (arXiv 2512.06727). Its scales are dynamic, one per token and block; static steps, one per latent, cost no bytes
per token.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..bundle import Bundle, CodedBlock
from ..codecs import DynamicQuantizer
from ..errors import InputError
from ..fit.basis import fit_quantizer
from ..fit.statistics import bands_of, collect_statistics
from ..plan import BitGroup, Block, Scales

_SAMPLE_TOKENS = 4096


@torch.no_grad()
def quantize_latents(bundle: Bundle, model: PreTrainedModel, windows: Tensor, bits: int, scales: Scales) -> Bundle:
    """Store every latent of a bundle in ``bits`` bits, its codecs unchanged.

    Args:
        bundle: whose codecs stay.
        model: the model it was fitted for.
        windows: token ids int64 ``[N, context]``, to fit static steps on; not read for dynamic ones.
        bits: 1 to 8.
        scales: "static" (a step per latent) or "dynamic" (the paper's, a step per token).

    Raises:
        InputError: bits out of range, unknown scales, a lossless block, or latents that take no more bits already.
    """
    if not 1 <= bits <= 8:
        raise InputError(f"latents are quantised to 1 to 8 bits, got {bits}")
    if scales not in ("static", "dynamic"):
        raise InputError(f"scales must be static or dynamic, got {scales!r}")
    if any(coded.codec is None for coded in bundle.blocks):
        raise InputError("a lossless block has no latents to quantise")
    fewest = min(group.bits for block in bundle.plan.blocks for group in block.groups)
    if fewest <= bits:
        raise InputError(
            f"latents of this bundle take {fewest} bits already, and would not be smaller in {bits}; give a bundle whose latents all "
            "take more, such as one of fit-structure --latent-bits 16"
        )
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
    stride = max(1, windows.numel() // _SAMPLE_TOKENS)
    bands = bands_of(plan.geometry, [block.slots for block in blocks])
    statistics = collect_statistics(model, plan.geometry, windows, bands, plan.sinks, stride)
    coded = []
    for each, block in zip(bundle.blocks, blocks, strict=True):
        assert each.codec is not None
        sample = each.codec.encode(statistics.sample(block.slots))
        coded.append(replace(each, quantizer=fit_quantizer(block.groups, sample)))
    return tuple(coded)
