"""Vectors of all heads of a layer, put together from what its readers give."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .inputs import PagedPast, Reader


def all_heads(readers: tuple[Reader, ...], restored: Callable[[Reader], Tensor]) -> Tensor:
    """Vectors ``[B, H, N, D]`` of all heads; ``restored`` gives what a reader decodes, ``[B, N, R]``."""
    parts: dict[int, Tensor] = {}
    for reader in readers:
        own = reader.decode(restored(reader)).unflatten(-1, (len(reader.heads), -1))
        parts |= {head: own[:, :, place] for place, head in enumerate(reader.heads)}
    return torch.stack([parts[head] for head in range(len(parts))], dim=1)


def turned_keys(paged: PagedPast, keys: Tensor, start: int) -> Tensor:
    """Keys ``[B, H, N, D]`` of the tokens at places ``start`` on after RoPE; those stored after it stay as they are."""
    turning = [head for reader in paged.key_readers if not reader.rotated for head in reader.heads]
    if paged.rotary is None or not turning:
        return keys
    positions = paged.token_index(start, keys.shape[2]) - paged.offset[:, None]
    if len(turning) == keys.shape[1]:
        return paged.rotary.rotate(keys, positions)
    keys[:, turning] = paged.rotary.rotate(keys[:, turning], positions)
    return keys
