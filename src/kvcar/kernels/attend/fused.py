"""One tile of pages for many query rows, by PyTorch's fused attention: keys and values are decoded, scores never exist.

For prefills on CPUs. The fused kernel tells the log-sum-exp of what it saw, with which a tile joins what other pieces gave.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .assemble import all_heads, turned_keys
from .inputs import PagedPast, Reader

FEWEST_ROWS = 32
_OPERATION = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


def serves(q: Tensor, softcap: float | None) -> bool:
    """Whether queries ``[B, H, Q, D]`` are many enough, and PyTorch has a fused kernel for them that tells the log-sum-exp."""
    return _OPERATION is not None and q.device.type == "cpu" and softcap is None and q.shape[2] >= FEWEST_ROWS


def attend_tile(q: Tensor, paged: PagedPast, start: int, restored: Callable[[Reader], Tensor]) -> tuple[Tensor, Tensor]:
    """Attention of scaled queries ``[B, H, Q, D]`` over a tile of which all tokens may be seen.

    Args:
        q: the queries.
        paged: the past.
        start: place of the tile's first token.
        restored: what a reader decodes of the tile, ``[B, S, R]``.

    Returns:
        Output ``[B, H, Q, D]`` and log-sum-exp of the scores ``[B, H, Q, 1]``.
    """
    keys = turned_keys(paged, all_heads(paged.key_readers, restored), start)
    values = all_heads(paged.value_readers, restored)
    assert _OPERATION is not None
    output, log_sum = _OPERATION(q, keys, values, 0.0, False, scale=1.0)
    return output, log_sum[..., None]
