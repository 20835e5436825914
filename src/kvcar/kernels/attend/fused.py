"""Pieces of the past for many query rows, by PyTorch's fused attention: keys and values are decoded, scores never exist.

For prefills on CPUs. The fused kernel tells the log-sum-exp of what it saw, with which a piece joins what others gave.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .assemble import all_heads, turned_keys
from .inputs import ExactPast, PagedPast, Reader

FEWEST_ROWS = 32
NOTHING = -1e30  # log-sum-exp of a row that has seen no token; finite, so that differences are numbers
_OPERATION = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


def serves(q: Tensor, softcap: float | None) -> bool:
    """Whether queries ``[B, H, Q, D]`` are many enough, and PyTorch has a fused kernel for them that tells the log-sum-exp."""
    return _OPERATION is not None and q.device.type == "cpu" and softcap is None and q.shape[2] >= FEWEST_ROWS


def attend_exact(q: Tensor, exact: ExactPast, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attention of scaled queries ``[B, H, Q, D]`` over what is held exactly, under ``mask`` bool ``[B or 1, 1, Q, S]``.

    Returns:
        See ``attend_tile``.
    """
    return _attend(q, exact.keys.float(), exact.values.float(), mask)


def attend_tile(
    q: Tensor, paged: PagedPast, start: int, restored: Callable[[Reader], Tensor], visible: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attention of scaled queries ``[B, H, Q, D]`` over a tile.

    Args:
        q: the queries.
        paged: the past.
        start: place of the tile's first token.
        restored: what a reader decodes of the tile, ``[B, S, R]``.
        visible: bool ``[B, S]``, which tokens may be seen; None for all.

    Returns:
        Output ``[B, H, Q, D]`` and log-sum-exp of the scores ``[B, H, Q, 1]``.
    """
    keys = turned_keys(paged, all_heads(paged.key_readers, restored), start)
    values = all_heads(paged.value_readers, restored)
    return _attend(q, keys, values, None if visible is None else visible[:, None, None, :])


def _attend(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    assert _OPERATION is not None
    if mask is None:
        output, log_sum = _OPERATION(q, keys, values, 0.0, False, scale=1.0)
        return output, log_sum[..., None]
    added = torch.zeros(mask.shape, device=q.device).masked_fill_(~mask, -torch.inf)
    output, log_sum = _OPERATION(q, keys, values, 0.0, False, attn_mask=added, scale=1.0)
    # Of a row that sees nothing the operation says 0, both times.
    return output, log_sum[..., None].masked_fill_(~mask.any(-1, keepdim=True), NOTHING)
