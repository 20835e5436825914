"""Fisher information of key and value projections, and ranks in proportion to it.

Source: Palu, arXiv 2407.21118: a matrix' information is the mean over its elements of the root of the mean squared
gradient of the loss; each group of heads gets its share of all ranks, at most all of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kvcar.errors import InputError
from kvcar.models.structure import find_decoder

from .calibration import Block, Calibration

_CONTEXT, _WINDOWS = 512, 8
_PROJECTIONS = {"key": "k_proj", "value": "v_proj"}


def fisher_of_blocks(calibration: Calibration, blocks: Sequence[Block]) -> list[float]:
    """Information of each block's rows of its layer's projection.

    Raises:
        InputError: the model's attention has no separate ``k_proj`` and ``v_proj``.
    """
    attention = find_decoder(calibration.model, calibration.geometry.layers).attention
    weights = []
    for block in blocks:
        projection = getattr(attention[block[0].layer], _PROJECTIONS[block[0].kind], None)
        if projection is None:
            raise InputError("Palu's Fisher information needs attention with a k_proj and a v_proj; leave its rows out")
        weights.append(projection.weight)
    squares = _mean_squared_gradients(calibration, list({id(w): w for w in weights}.values()))
    dim = calibration.geometry.head_dim
    found = []
    for block, weight in zip(blocks, weights, strict=True):
        rows = squares[id(weight)].view(-1, dim, weight.shape[1])[[slot.head for slot in block]]
        found.append(float(rows.sqrt().mean()))
    return found


def _mean_squared_gradients(calibration: Calibration, weights: list[Tensor]) -> dict[int, Tensor]:
    model, windows = calibration.model, calibration.windows[:_WINDOWS, :_CONTEXT].to(calibration.model.device)
    squares = {id(weight): torch.zeros_like(weight) for weight in weights}
    before = [weight.requires_grad for weight in weights]
    for weight in weights:
        weight.requires_grad_(True)
    try:
        with torch.enable_grad():
            for window in windows:
                loss = model(input_ids=window[None], labels=window[None], use_cache=False).loss
                for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
                    squares[id(weight)] += gradient.square() / len(windows)
    finally:
        for weight, needed in zip(weights, before, strict=True):
            weight.requires_grad_(needed)
    return squares


def share_ranks(information: Sequence[float], full: Sequence[int], kept: float) -> list[int]:
    """Ranks in proportion to information that add up to ``kept`` of all ranks.

    Args:
        information: of each group, above 0.
        full: each group's width, which its rank cannot exceed.
        kept: share of all ranks, above 0 and at most 1.
    """
    total = max(len(full), round(kept * sum(full)))
    # What groups at their width cannot use goes to the others, again in proportion; each keeps at least one rank.
    capped: set[int] = set()
    while True:
        free = [i for i in range(len(full)) if i not in capped]
        left = total - sum(full[i] for i in capped)
        scale = left / sum(information[i] for i in free) if free else 0.0
        over = {i for i in free if information[i] * scale > full[i]}
        if not over:
            break
        capped |= over
    exact = [float(full[i]) if i in capped else max(1.0, information[i] * scale) for i in range(len(full))]
    ranks = [math.floor(each) for each in exact]
    by_remainder = sorted(range(len(full)), key=lambda i: ranks[i] - exact[i])
    for i in by_remainder * len(full):
        if sum(ranks) >= total:
            break
        ranks[i] += ranks[i] < full[i]
    return ranks
