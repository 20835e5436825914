"""The specification: decode the whole past, then ordinary softmax attention in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from .inputs import ATTENTION, ExactPast, PagedPast, Reader, all_heads, turned_keys


@ATTENTION.register("naive")
def attend(
    query: Tensor,
    exact: ExactPast,
    paged: PagedPast | None,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Compute the attention output ``[B, Hq, T, D]`` in the query's dtype.

    Args:
        query: ``[B, Hq, T, D]`` after RoPE; query head ``i`` reads KV head ``i // (Hq / H)``.
        exact: tokens kept exactly.
        paged: tokens in pages, or None when there are none.
        scaling: factor on the scores.
        softcap: scores become ``softcap * tanh(score / softcap)`` where given.
        sinks: ``[Hq]``, one more score for each query head that no value belongs to, where given.
    """
    exact, heads = exact.joined(), exact.keys.shape[1]
    keys, values = exact.keys.float(), exact.values.float()
    tokens = query.shape[2]
    mask = torch.ones(query.shape[0], 1, tokens, keys.shape[2], dtype=torch.bool, device=query.device)
    if exact.mask is not None:
        mask = mask & exact.mask
    if paged is not None:
        past_keys, past_values = _decode_all(paged)
        keys = torch.cat([past_keys, keys], dim=2)
        values = torch.cat([past_values, values], dim=2)
        visible = paged.mask(0, paged.tokens)
        there = torch.ones_like(mask[..., :1]).expand(-1, -1, -1, paged.tokens)
        mask = torch.cat([there if visible is None else there & visible, mask], dim=-1)
    groups = query.shape[1] // heads
    keys = keys.repeat_interleave(groups, dim=1)
    values = values.repeat_interleave(groups, dim=1)
    scores = query.float() @ keys.transpose(2, 3) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : mask.shape[-1]]
    # A padded query sees nothing; its output is never used, but must not be NaN as that of one that sees NaN is.
    weights = weights.masked_fill(~mask.any(-1, keepdim=True), 0.0)
    return (weights @ values).to(query.dtype)


def _decode_all(paged: PagedPast) -> tuple[Tensor, Tensor]:
    """Decode keys and values ``[B, H, N, D]`` of all pages."""
    pages, there = torch.cat(list(paged.tiles), dim=1), slice(paged.tokens)

    def vectors(reader: Reader) -> Tensor:
        return reader.vectors(reader.restored(pages, tokens=there), [pages], there)

    keys = turned_keys(paged, all_heads(paged.key_readers, vectors), 0)
    return keys, all_heads(paged.value_readers, vectors)
