"""One tile of pages for many query rows, by PyTorch's fused attention: keys and values are decoded, scores never exist.

For prefills on CPUs. The fused kernel tells the log-sum-exp of what it saw, with which a tile joins what other pieces gave.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .inputs import PagedPast, Reader

FEWEST_ROWS = 32
_OPERATION = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


def serves(q: Tensor, softcap: float | None) -> bool:
    """Whether queries ``[B, H, Q, D]`` are many enough, and PyTorch has a fused kernel for them that tells the log-sum-exp."""
    return _OPERATION is not None and q.device.type == "cpu" and softcap is None and q.shape[2] >= FEWEST_ROWS


def attend_tile(
    q: Tensor, paged: PagedPast, start: int, stored: Mapping[Reader, Callable[[], Tensor]]
) -> tuple[Tensor, Tensor]:
    """Attention of scaled queries ``[B, H, Q, D]`` over a tile of which all tokens may be seen.

    Args:
        q: the queries.
        paged: the past.
        start: place of the tile's first token.
        stored: gives the tile's stored values ``[B, S, R]`` for every reader.

    Returns:
        Output ``[B, H, Q, D]`` and log-sum-exp of the scores ``[B, H, Q, 1]``.
    """
    keys = _decoded(paged.key_readers, stored, q.shape[1])
    turned = [head for reader in paged.key_readers if not reader.rotated for head in reader.heads]
    if paged.rotary is not None and turned:
        positions = paged.token_index(start, keys.shape[2]) - paged.offset[:, None]
        if len(turned) == keys.shape[1]:
            keys = paged.rotary.rotate(keys, positions)
        else:
            keys[:, turned] = paged.rotary.rotate(keys[:, turned], positions)
    values = _decoded(paged.value_readers, stored, q.shape[1])
    assert _OPERATION is not None
    output, log_sum = _OPERATION(q, keys, values, 0.0, False, scale=1.0)
    return output, log_sum[..., None]


def _decoded(readers: tuple[Reader, ...], stored: Mapping[Reader, Callable[[], Tensor]], heads: int) -> Tensor:
    """Vectors ``[B, H, S, D]`` of all heads, keys not turned yet."""
    parts: list[Tensor | None] = [None] * heads
    for reader in readers:
        own = reader.decode(stored[reader]()).unflatten(-1, (len(reader.heads), -1))
        if len(readers) == 1 and reader.heads == tuple(range(heads)):
            return own.transpose(1, 2).contiguous()
        for place, head in enumerate(reader.heads):
            parts[head] = own[:, :, place]
    return torch.stack([part for part in parts if part is not None], dim=1)
