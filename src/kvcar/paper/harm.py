"""What it costs to let one slot read another: the divergence it causes, measured one slot at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..models.geometry import read_geometry
from ..plan import CacheConfig, Plan, Reuse
from .reuse import Candidate
from ..progress import OnProgress, silent
from .layers import LayerStack
from ..fit.losses import kl_divergence
from .simulate import Simulator


@torch.no_grad()
def measure_harm(
    model: PreTrainedModel,
    windows: Tensor,
    candidates: Sequence[Candidate],
    sinks: int = 4,
    on_progress: OnProgress = silent,
) -> list[Candidate]:
    """The same candidates with the KL divergence per token, in nats, that each one's reuse alone causes.

    Args:
        model: with sdpa attention.
        windows: token ids int64 ``[N, context]``, all run at once.
        candidates: slots and sources; a source lies in a lower layer.
        sinks: first tokens that stay exact.
        on_progress: told after each candidate.

    Raises:
        InputError: the model uses another attention implementation.
    """
    geometry = read_geometry(model.config)
    ids = windows.to(next(model.parameters()).device)
    stack = LayerStack(model, geometry.layers)
    full = model(input_ids=ids, use_cache=False).logits
    measured: list[Candidate] = []
    prefix: tuple[int, Tensor] | None = None
    order = sorted(range(len(candidates)), key=lambda i: candidates[i].source)
    for done, index in enumerate(order, 1):
        slot, source, _ = candidates[index]
        plan = Plan(geometry=geometry, reuses=(Reuse(slot=slot, source=source),), cache=CacheConfig(window=0, sinks=sinks))
        if source.layer:
            # What reaches the source's layer is the same for all its candidates; candidates come layer by layer.
            prefix = (source.layer, stack.hidden(ids, source.layer, prefix))
        with (
            Simulator(model, plan, {}) as simulator,
            simulator.compressing(),
            stack.starting_at(*(prefix or (0, None))),
        ):
            measured.append(Candidate(slot, source, float(kl_divergence(simulator.logits(ids), full))))
        on_progress("measure harm", done, len(candidates))
    return [measured[order.index(i)] for i in range(len(candidates))]
