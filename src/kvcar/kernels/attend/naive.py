"""The specification: decode the whole past, then ordinary softmax attention in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from .inputs import ExactPast, PagedPast, Reader


def attend(
    query: Tensor, exact: ExactPast, paged: PagedPast | None, scaling: float, softcap: float | None = None
) -> Tensor:
    """Attention output ``[B, Hq, T, D]`` in the query's dtype.

    Args:
        query: ``[B, Hq, T, D]`` after RoPE; query head ``i`` reads KV head ``i // (Hq / H)``.
        exact: tokens held exactly.
        paged: tokens held as pages, or None when there are none.
        scaling: factor on the scores.
        softcap: scores become ``softcap * tanh(score / softcap)`` where given.
    """
    heads = exact.keys.shape[1]
    keys, values = exact.keys.float(), exact.values.float()
    tokens = query.shape[2]
    mask = torch.ones(query.shape[0], 1, tokens, keys.shape[2], dtype=torch.bool, device=query.device)
    if exact.mask is not None:
        mask = mask & exact.mask
    if paged is not None:
        past_keys, past_values, visible = _decode_all(paged, heads)
        keys = torch.cat([past_keys, keys], dim=2)
        values = torch.cat([past_values, values], dim=2)
        mask = torch.cat([visible[:, None, None, :].expand(-1, -1, tokens, -1), mask], dim=-1)
    groups = query.shape[1] // heads
    keys = keys.repeat_interleave(groups, dim=1)
    values = values.repeat_interleave(groups, dim=1)
    scores = query.float() @ keys.transpose(2, 3) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = torch.softmax(scores.masked_fill(~mask, -torch.inf), dim=-1)
    # A padded query sees nothing; its output is never used, but must not be NaN.
    return (torch.nan_to_num(weights) @ values).to(query.dtype)


def _decode_all(paged: PagedPast, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values ``[B, H, N, D]`` of all pages, and which tokens may be seen, bool ``[B, N]``."""
    pages = torch.cat(list(paged.tiles), dim=1)
    index = paged.token_index(0, paged.tokens)
    keys = _assemble(pages, paged.key_readers, heads, paged.tokens)
    if paged.rotary is not None:
        rotated = paged.rotary.rotate(keys, index - paged.offset[:, None])
        for reader in paged.key_readers:
            if not reader.rotated:
                keys[:, list(reader.heads)] = rotated[:, list(reader.heads)]
    values = _assemble(pages, paged.value_readers, heads, paged.tokens)
    return keys, values, index >= paged.first[:, None]


def _assemble(pages: Tensor, readers: tuple[Reader, ...], heads: int, tokens: int) -> Tensor:
    parts: dict[int, Tensor] = {}
    for reader in readers:
        decoded = reader.decode(reader.restored(pages)[:, :tokens])
        columns = decoded.unflatten(-1, (len(reader.heads), -1)).unbind(-2)
        parts.update(zip(reader.heads, columns, strict=True))
    return torch.stack([parts[head] for head in range(heads)], dim=1)
