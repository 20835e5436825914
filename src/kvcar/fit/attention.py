"""Attention as a compressed cache would compute it, for all tokens of a window at once.

A query reads the tokens of its own step, and the sinks, exactly, and every earlier token as decoded. Stepping through
a cache gives the same numbers one step at a time (window 0); here gradients flow through them.
"""

from __future__ import annotations

import torch
from torch import Tensor


def read_exactly(tokens: int, step_tokens: int, device: torch.device, window: int = 0) -> Tensor:
    """Which query (row) reads which key as it is: those of its own step and of the window before; bool ``[T, T]``.

    Args:
        tokens: ``T``.
        step_tokens: tokens fed at once.
        device: where the mask is wanted.
        window: recent tokens kept exactly, a multiple of ``step_tokens``.
    """
    step = torch.arange(tokens, device=device) // step_tokens
    apart = step[:, None] - step[None, :]
    return (apart >= 0) & (apart <= window // step_tokens)


def compressed_attention(
    query: Tensor,
    exact: tuple[Tensor, Tensor],
    decoded: tuple[Tensor, Tensor],
    exactly: Tensor,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    hidden: Tensor | None = None,
) -> Tensor:
    """Causal attention output ``[B, Hq, T, D]`` in the query's dtype.

    Args:
        query: ``[B, Hq, T, D]`` after RoPE.
        exact: keys after RoPE and values ``[B, H, T, D]`` as the model computed them.
        decoded: the same as the cache gives them back.
        exactly: see ``read_exactly``.
        scaling: factor on the scores.
        softcap: scores become ``softcap * tanh(score / softcap)`` where given.
        sinks: ``[Hq]``, one more score for each query head that no value belongs to, where given.
        hidden: which query (row) does not see which token, bool ``[T, T]``; None for later ones alone.
    """
    batch, query_heads, tokens, head_dim = query.shape
    heads = exact[0].shape[1]
    q = query.float().reshape(batch, heads, -1, head_dim) * scaling
    rows = (batch, heads, query_heads // heads, tokens)
    keys, values = (x.float()[:, :, None] for x in exact)
    decoded_keys, decoded_values = (x.float()[:, :, None] for x in decoded)
    q = q.view(*rows, head_dim)
    scores = q @ decoded_keys.transpose(-1, -2)
    # Steps of one token meet themselves on the diagonal alone, which needs no second matrix of scores.
    single = bool(exactly.sum() == tokens)
    if single:
        scores.diagonal(dim1=-2, dim2=-1).copy_((q * keys).sum(-1))
    else:
        scores = torch.where(exactly, q @ keys.transpose(-1, -2), scores)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    hidden = torch.ones_like(exactly).triu(1) if hidden is None else hidden
    weights = softmax_with_sinks(scores.masked_fill_(hidden, -torch.inf), sinks)
    output = weights @ decoded_values
    if single:
        output = output + weights.diagonal(dim1=-2, dim2=-1)[..., None] * (values - decoded_values)
    else:
        output = output + (weights * exactly) @ (values - decoded_values)
    return output.view(batch, query_heads, tokens, head_dim).to(query.dtype)


def softmax_with_sinks(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Weights ``[B, H, G, T, S]`` of scores; sinks ``[H * G]``, where given, take a share that goes to no value."""
    if sinks is None:
        return torch.softmax(scores, dim=-1)
    own = sinks.float().view(1, scores.shape[1], scores.shape[2], 1, 1).expand(*scores.shape[:-1], 1)
    return torch.softmax(torch.cat([scores, own], dim=-1), dim=-1)[..., :-1]
