"""At which positions keys stand that an engine hands over after RoPE without saying so.

Un-rotating composes: a page that begins at ``p`` is un-rotated as if it began at 0, and then once more by ``p``, which is
the same for all its tokens. So one mean key of the page is tried at every place where a page can begin, and compared
with the mean that the codecs know. A place that is found wrongly costs quality, never correctness: it is stored, and
keys are rotated back by it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .record_coder import RecordCoder

_PLACES_AT_ONCE = 64


@torch.no_grad()
def find_position(coder: RecordCoder, keys: Tensor, step: int) -> int | None:
    """Find the position of the first token of a page among the multiples of ``step``.

    Args:
        coder: of the bundle.
        keys: after RoPE ``[L, H, T, D]``.
        step: tokens between places where pages begin.

    Returns:
        The position; None where keys do not rotate or no codec knows a mean.
    """
    means = coder.key_means
    if means is None:
        return None
    known, weight = means
    page = coder.before_rope(keys.to(coder.device), 0).mean(2, keepdim=True)
    places = range(0, coder.geometry.max_positions, step)
    costs = torch.cat(
        [
            _costs(coder, page, known, weight, places[first : first + _PLACES_AT_ONCE])
            for first in range(0, len(places), _PLACES_AT_ONCE)
        ]
    )
    return places[int(costs.argmin())]


def _costs(coder: RecordCoder, page: Tensor, known: Tensor, weight: Tensor, places: range) -> Tensor:
    """How far the mean key ``[L, H, 1, D]`` lies from the known one ``[L, H, D]``, for every place."""
    tried = coder.before_rope_at(page.expand(-1, -1, len(places), -1), torch.tensor(places, device=page.device))
    return ((tried - known[:, :, None]).square() * weight[:, :, None]).sum((0, 1, 3))
