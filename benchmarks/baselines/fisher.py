"""Fisher information of key and value projections, and ranks in proportion to it.

Source: Palu, arXiv 2407.21118: a matrix' information is the mean over its elements of the root of the mean squared
gradient of the loss; each group of heads gets its share of all ranks, at most all of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from kvcar.errors import InputError
from kvcar.models.structure import find_decoder

from .calibration import Block, Calibration

_CONTEXT, _WINDOWS = 512, 8
_LEAST, _BISECTIONS = 1e-30, 200
_PROJECTIONS = {"key": "k_proj", "value": "v_proj"}


@lru_cache(maxsize=1)
def fisher_of_blocks(calibration: Calibration, blocks: tuple[Block, ...]) -> tuple[float, ...]:
    """Information of each block's rows of its layer's projection; kept, since every size of Palu asks for it.

    Raises:
        InputError: the model's attention has no separate ``k_proj`` and ``v_proj``.
    """
    attention = find_decoder(calibration.model).attention
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
    return tuple(found)


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
    low, high = 0.0, max(full) / max(min(information), _LEAST)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(_clipped(information, full, middle)) <= total else (low, middle)
    exact = _clipped(information, full, low)
    ranks = [math.floor(each) for each in exact]
    # Whole ranks that rounding down left over go where most was cut off.
    for i in sorted(range(len(full)), key=lambda i: ranks[i] - exact[i])[: total - sum(ranks)]:
        ranks[i] += ranks[i] < full[i]
    return ranks


def _clipped(information: Sequence[float], full: Sequence[int], scale: float) -> list[float]:
    """Shares at a scale: at least one rank, at most the width."""
    return [min(float(width), max(1.0, each * scale)) for each, width in zip(information, full, strict=True)]
