"""Latents where they matter: how much each block's error moves the model's output decides how many it keeps.

To second order the divergence is proportional to the energy of the error. So one cut per block, tried out alone, tells what a
unit of its error costs, and principal directions of all blocks compete for the same number of latents by cost x variance.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..codecs import LinearCodec
from ..fit.basis import Basis
from ..fit.bits import share_latents
from ..fit.losses import kl_divergence
from ..fit.statistics import Statistics
from ..plan import RAW_BITS, BitGroup, Plan
from ..progress import OnProgress, silent
from .simulate import LayerStack, Simulator


def latents_by_effect(
    model: PreTrainedModel,
    windows: Tensor,
    plan: Plan,
    statistics: Statistics,
    latents: tuple[int, ...],
    on_progress: OnProgress = silent,
) -> tuple[int, ...]:
    """As many latents in all as ``latents``, shared among blocks by their effect on the output.

    Args:
        model: with sdpa attention.
        windows: token ids int64 ``[N, context]``, all run at once.
        plan: its blocks are to be coded, each within a layer.
        statistics: of keys and values.
        latents: an even share for every block, where its effect is measured.
        on_progress: told after each block.
    """
    bases = [statistics.basis(block.slots, "std") for block in plan.blocks]
    costs = []
    stack, ids = LayerStack(model, plan.geometry.layers), windows.to(next(model.parameters()).device)
    with torch.no_grad():
        full = model(input_ids=ids, use_cache=False).logits
    prefix: tuple[int, Tensor] | None = None
    for index, (basis, count) in enumerate(zip(bases, latents, strict=True)):
        layer = plan.blocks[index].slots[0].layer
        if layer:
            prefix = (layer, stack.hidden(ids, layer, prefix))
        divergence = _divergence(model, stack, ids, full, prefix, plan, index, basis, count)
        costs.append(divergence / float(basis.variances[count:].sum().clamp_min(1e-9)))
        on_progress("measure each block's effect", index + 1, len(bases))
    return share_latents([cost * basis.variances for cost, basis in zip(costs, bases, strict=True)], sum(latents))


@torch.no_grad()
def _divergence(
    model: PreTrainedModel,
    stack: LayerStack,
    ids: Tensor,
    full: Tensor,
    prefix: tuple[int, Tensor] | None,
    plan: Plan,
    index: int,
    basis: Basis,
    latents: int,
) -> float:
    """KL divergence per token with one block cut to its first ``latents`` directions."""
    groups = (BitGroup(bits=RAW_BITS, count=latents),)
    block = plan.blocks[index].model_copy(update={"codec": "linear", "groups": groups, "scales": "static"})
    alone = Plan(geometry=plan.geometry, blocks=(block,), cache=plan.cache.with_window(0))
    parts = (basis.mean, basis.encoder[:, :latents], basis.decoder[:latents])
    codec = LinearCodec(*(t.float().to(ids.device) for t in parts))
    units = {"0": lambda x: codec.decode(codec.encode(x))}
    with (
        Simulator(model, alone, units) as simulator,
        simulator.compressing(),
        stack.starting_at(*(prefix or (0, None))),
    ):
        return float(kl_divergence(simulator.logits(ids), full))
