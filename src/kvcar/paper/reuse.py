"""Choosing which slots reuse another one: Algorithm 2 of KV-CAR (arXiv 2512.06727) and its rivals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..errors import InputError
from ..plan import Reuse
from ..geometry import Slot

MEASURES = ("l1", "relative_l1", "cosine", "cka", "prediction")


class Candidate(NamedTuple):
    """A slot that could read ``source`` instead of being stored, and what that costs: a distance or a divergence."""

    slot: Slot
    source: Slot
    cost: float


def choose_reuses(
    candidates: Sequence[Candidate],
    count: int | None = None,
    threshold: float | None = None,
    dissimilar: bool = False,
) -> tuple[Reuse, ...]:
    """The cheapest ``count`` candidates, or all that cost less than ``threshold``, in the order of slots.

    A source may itself be reused; such a chain ends at one stored slot.

    Args:
        candidates: at most one for each slot.
        count: how many to take.
        threshold: highest cost, not included.
        dissimilar: take the dearest instead (KVSharer, arXiv 2410.18517).

    Raises:
        InputError: neither or both of ``count`` and ``threshold``, or more than there are.
    """
    if (count is None) == (threshold is None):
        raise InputError("choose reuses by a count or by a threshold, one of them")
    order = sorted(candidates, key=lambda c: (-c.cost if dissimilar else c.cost, c.slot))
    if count is not None:
        if not 0 <= count <= len(order):
            raise InputError(f"this model has {len(order)} slots that could reuse another; asked for {count}")
        chosen = order[:count]
    else:
        assert threshold is not None
        chosen = [c for c in order if (c.cost > threshold if dissimilar else c.cost < threshold)]
    return tuple(Reuse(slot=c.slot, source=c.source) for c in sorted(chosen))
