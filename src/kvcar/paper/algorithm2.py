"""The paper's Algorithm 2: which slots need not be stored, because the layer below holds one that stands in for them.

Source: KV-CAR (arXiv 2512.06727). The paper compares heads of adjacent layers by their mean L1 distance over calibration text.
Sharing by the divergence that it causes, measured one slot at a time, does far less harm at the same saving. Keys are
compared before RoPE, as they are stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..bundle import Bundle, identify
from ..errors import InputError
from ..fit.capture import capture
from ..fit.fit import fit_provenance
from ..fit.losses import kl_divergence
from ..geometry import KINDS, Kind, KVGeometry, Slot
from ..models.geometry import geometry_of
from ..plan import CacheConfig, Plan, Reuse
from ..progress import OnProgress, counter, silent
from ..text import TextSource
from .simulate import LayerStack, Simulator

Measure = Literal["l1", "kl"]
MEASURES: tuple[Measure, ...] = ("l1", "kl")

# A pass for every slot: the divergence is measured on fewer tokens than the distance.
_KL_WINDOWS, _KL_CONTEXT = 2, 256


class Candidate(NamedTuple):
    """A slot that could read ``source`` instead of being stored, and what that costs: a distance or a divergence."""

    slot: Slot
    source: Slot
    cost: float


def find_candidates(
    model: PreTrainedModel,
    windows: Tensor,
    measure: str = "l1",
    any_head: bool = False,
    sinks: int = 4,
    on_progress: OnProgress = silent,
) -> list[Candidate]:
    """Find for every slot that has a codable layer below it which slot there could stand in for it, and at what cost.

    Args:
        model: with sdpa attention.
        windows: token ids int64 ``[N, context]``.
        measure: "l1" (the paper's: mean absolute difference of elements) or "kl" (divergence in nats per token that this
            reuse alone causes; on the first windows only).
        any_head: consider all heads below and take the nearest by L1, not only the one of the same number.
        sinks: first tokens, which stay exact and are not compared.
        on_progress: told how far it is.

    Raises:
        InputError: the measure is not known, or fewer than two layers can be compared.
        FitError: keys or values are NaN or infinite.
    """
    if measure not in MEASURES:
        raise InputError(f"unknown measure {measure!r}; known are: {', '.join(MEASURES)}")
    geometry = geometry_of(model)
    if measure == "kl" and not any_head:
        found = _same_heads(geometry)
    else:
        found = _nearest(geometry, l1_distances(model, windows, sinks, on_progress), any_head)
    if measure == "l1":
        return found
    return measure_harm(model, windows[:_KL_WINDOWS, :_KL_CONTEXT], found, sinks, on_progress)


def choose_reuses(
    candidates: Sequence[Candidate], count: int | None = None, threshold: float | None = None
) -> tuple[Reuse, ...]:
    """Choose the cheapest ``count`` candidates, or all that cost less than ``threshold``, in the order of slots.

    A source may itself be reused; such a chain ends at one stored slot.

    Args:
        candidates: at most one for each slot.
        count: how many to take.
        threshold: highest cost, not included.

    Raises:
        InputError: neither or both of ``count`` and ``threshold``, or more than there are.
    """
    if (count is None) == (threshold is None):
        raise InputError("choose reuses by a count or by a threshold, one of them")
    order = sorted(candidates, key=lambda c: (c.cost, c.slot))
    if threshold is not None:
        order = [c for c in order if c.cost < threshold]
    elif count is not None and not 0 <= count <= len(order):
        raise InputError(f"this model has {len(order)} slots that could reuse another; asked for {count}")
    chosen = order[:count]
    return tuple(Reuse(slot=c.slot, source=c.source) for c in sorted(chosen))


def shared_bundle(
    model: PreTrainedModel, name: str, windows: Tensor, source: TextSource, reuses: tuple[Reuse, ...], window: int = 64
) -> Bundle:
    """Make a bundle that codes nothing and leaves out the slots that read another one.

    Args:
        model: whose cache it is for.
        name: what to call the model in the bundle.
        windows, source: what the slots were compared on, for provenance.
        reuses: see ``choose_reuses``.
        window: recent tokens kept exact.

    Raises:
        InputError: nothing is shared.
    """
    if not reuses:
        raise InputError("no slot is cheap enough to be shared; raise the threshold or the count")
    plan = Plan(geometry=geometry_of(model), reuses=reuses, cache=CacheConfig(window=window))
    print_, identity = identify(model, name)
    return Bundle(plan, (), print_, identity, fit_provenance(windows, source, 0, {"reuses": len(reuses)}))


# The paper's measure


@torch.no_grad()
def l1_distances(
    model: PreTrainedModel, windows: Tensor, sinks: int = 4, on_progress: OnProgress = silent
) -> dict[tuple[int, Kind], Tensor]:
    """Measure mean absolute differences between the heads of each layer and of the codable layer below it, in one pass.

    Returns:
        (upper layer, kind) -> float64 ``[H, H]``, row: head of the upper layer, column: head of the lower.
    """
    geometry = geometry_of(model)
    pairs: list[tuple[int, int, Kind]] = [
        (below, layer, kind) for below, layer in _layer_pairs(geometry) for kind in KINDS
    ]
    sums = [torch.zeros(geometry.kv_heads, geometry.kv_heads, dtype=torch.float64) for _ in pairs]
    blocks = [
        tuple(Slot(each, head, kind) for each in (below, layer) for head in range(geometry.kv_heads))
        for below, layer, kind in pairs
    ]

    def add(index: int, x: Tensor) -> None:
        lower, upper = x.cpu().unflatten(-1, (2, geometry.kv_heads, geometry.head_dim)).unbind(1)
        for head in range(geometry.kv_heads):
            sums[index][head] += (upper[:, head, None] - lower).abs().mean(-1).sum(0).double()

    total = windows.shape[0] * (windows.shape[1] - sinks)
    count = counter(on_progress, "compare heads", total)
    for tokens in capture(model, geometry, windows, blocks, sinks, add):
        count(tokens)
    return {(layer, kind): each / total for (_, layer, kind), each in zip(pairs, sums, strict=True)}


def _layer_pairs(geometry: KVGeometry) -> list[tuple[int, int]]:
    pairs = [pair for group in geometry.codable_groups for pair in pairwise(group)]
    if not pairs:
        raise InputError(
            "reuse needs at least two layers that may be compressed and keep as much; this model has fewer"
        )
    return pairs


def _same_heads(geometry: KVGeometry) -> list[Candidate]:
    """Every slot with the head of the same number in the layer below, costs still unknown."""
    return [
        Candidate(Slot(layer, head, kind), Slot(below, head, kind), float("nan"))
        for below, layer in _layer_pairs(geometry)
        for kind in KINDS
        for head in range(geometry.kv_heads)
    ]


def _nearest(geometry: KVGeometry, distances: dict[tuple[int, Kind], Tensor], any_head: bool) -> list[Candidate]:
    found = []
    for slot, source, _ in _same_heads(geometry):
        row = distances[slot.layer, slot.kind][slot.head]
        head = int(row.argmin()) if any_head else source.head
        found.append(Candidate(slot, Slot(source.layer, head, slot.kind), float(row[head])))
    return found


# The measure that wins


@torch.no_grad()
def measure_harm(
    model: PreTrainedModel,
    windows: Tensor,
    candidates: Sequence[Candidate],
    sinks: int = 4,
    on_progress: OnProgress = silent,
) -> list[Candidate]:
    """Measure the KL divergence per token, in nats, that each candidate's reuse alone causes; order is kept.

    Args:
        model: with sdpa attention.
        windows: token ids int64 ``[N, context]``, all run at once.
        candidates: slots and sources; a source lies in a lower layer.
        sinks: first tokens that stay exact.
        on_progress: told after each candidate.

    Raises:
        InputError: the model uses another attention implementation.
    """
    geometry = geometry_of(model)
    ids = windows.to(next(model.parameters()).device)
    stack = LayerStack(model)
    full = model(input_ids=ids, use_cache=False).logits
    measured: dict[Slot, Candidate] = {}
    prefix: tuple[int, Tensor] | None = None
    for slot, source, _ in sorted(candidates, key=lambda c: c.source):
        reuse = Reuse(slot=slot, source=source)
        plan = Plan(geometry=geometry, reuses=(reuse,), cache=CacheConfig(window=0, sinks=sinks))
        if source.layer:
            # What reaches the source's layer is the same for all its candidates; candidates come layer by layer.
            prefix = (source.layer, stack.hidden(ids, source.layer, prefix))
        with (
            Simulator(model, plan, {}) as simulator,
            simulator.compressing(),
            stack.starting_at(*(prefix or (0, None))),
        ):
            measured[slot] = Candidate(slot, source, float(kl_divergence(simulator.logits(ids), full)))
        on_progress("measure harm", len(measured), len(candidates))
    return [measured[each.slot] for each in candidates]
