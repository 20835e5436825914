"""The specification: score every page for every query head, and take the pages with most of the estimated attention."""

from __future__ import annotations

import torch
from torch import Tensor

from .summaries import Summary


def choose_pages(
    query: Tensor,
    summaries: Tensor,
    summary: Summary,
    scaling: float,
    most: int,
    hidden_pages: Tensor,
    with_next: bool,
    there: Tensor | None = None,
) -> Tensor:
    """Pages to attend to, int64 ``[B, most]``, ascending; the same for all heads of a layer.

    A head's estimated attention is a softmax of its scores over the pages, so that every head has one vote to share
    among them; votes are summed over heads and query tokens.

    Args:
        query: ``[B, Hq, T, D]`` after RoPE; query head ``i`` reads KV head ``i // (Hq / H)``.
        summaries: ``[B, H, P, vectors * D]`` of all filled pages, as ``summary`` made them.
        summary: what they are.
        scaling: factor on the scores.
        most: pages to take, at most those that there are.
        hidden_pages: int64 ``[B]``, how many of each sequence's first pages hold nothing but padding and sinks. They
            are taken only where there are no others.
        with_next: page ``P`` is taken in any case: it is partly filled and has no summary yet.
        there: int64 ``[B]``, how many pages are filled where that is fewer than ``P``; others are taken only where there are
            too few of them. None for all.
    """
    batch, heads, pages = summaries.shape[:3]
    rows = query.float().reshape(batch, heads, -1, query.shape[-1]) * scaling
    page = torch.arange(pages, device=query.device)
    hidden = page < hidden_pages[:, None]
    if there is not None:
        hidden = hidden | (page >= there[:, None])
    scores = summary.scores(rows, summaries.float()).masked_fill(hidden[:, None, None], -torch.inf)
    votes = torch.nan_to_num(torch.softmax(scores, dim=-1)).sum((1, 2))
    chosen = votes.masked_fill(hidden, -1.0).topk(most - int(with_next), dim=-1).indices
    if with_next:
        chosen = torch.nn.functional.pad(chosen, (0, 1), value=pages)
    return chosen.sort(dim=-1).values
