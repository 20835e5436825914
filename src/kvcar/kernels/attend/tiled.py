"""Attention over pages tile by tile with an online softmax; the past's keys and values never exist at once.

Keys are decoded a tile at a time and rotated. Values are summed as latents and decoded once per query where that
takes fewer multiplications than decoding the tile (one query token: nearly always). Keys of models without rotary
positions are not decoded either where their decoder is affine: it folds into the query.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from . import fused
from .inputs import ExactPast, PagedPast, Reader, pick
from .softmax import OnlineSoftmax, begin

_SHORTEST_TILE = 512
_LONGEST_TILE = 4096
_SCORES_AT_ONCE = 2**21
# Fused, a tile has no scores, and joining its output to what came before costs as much for a short one.
_FUSED_TILE = 2048


def attend(
    query: Tensor, exact: ExactPast, paged: PagedPast | None, scaling: float, softcap: float | None = None
) -> Tensor:
    """Same as ``naive.attend``."""
    q, state = begin(query, exact, scaling, softcap)
    if paged is not None:
        _add_pages(state, q, paged, softcap)
    return state.result().reshape(query.shape).to(query.dtype)


def _add_pages(state: OnlineSoftmax, q: Tensor, paged: PagedPast, softcap: float | None) -> None:
    key_folds = {reader: _fold_query(q, reader) for reader in paged.key_readers if _folds_keys(q, reader, paged)}
    fuse = not key_folds and fused.serves(q, softcap)
    for start, pages, count in _tiles(paged, tile_tokens(q.shape[1] * q.shape[2], fuse)):
        stored: dict[int, Tensor] = {}
        visible = paged.visible(start, count)
        if fuse:
            restored = partial(_stored_once, pages=pages, count=count, stored=stored)
            state.merge_output(*fused.attend_tile(q, paged, start, restored, visible))
            continue
        scores = _scores(q, paged, pages, start, count, key_folds, stored)
        weights = state.weights(scores, None if visible is None else visible[:, None, None, :])
        for reader in paged.value_readers:
            u = _stored_once(reader, pages, count, stored)
            if _sums_latents(q, reader):
                state.add_latents(weights, reader, u)
            else:
                values = reader.decode(u).unflatten(-1, (len(reader.heads), -1)).transpose(1, 2)
                state.add_decoded(weights, reader.heads, values)


def tile_tokens(rows: int, fuse: bool) -> int:
    """Tokens of a tile for so many query rows of one sequence, all heads counted.

    Few query rows take long tiles, so that each operation has enough to do; many rows take short ones, so that
    their scores stay small, unless they are fused.
    """
    if fuse:
        return _FUSED_TILE
    return max(_SHORTEST_TILE, min(_LONGEST_TILE, _SCORES_AT_ONCE // rows))


def _tiles(paged: PagedPast, most: int) -> Iterator[tuple[int, tuple[Tensor, ...], int]]:
    """First token, pages (in one or several tensors) and number of tokens, up to ``most``, of every tile that holds any."""
    page_tokens = paged.key_readers[0].segment.page_tokens
    target = max(1, most // page_tokens)
    start, left, tile, held = 0, paged.tokens, [], 0
    for arena in paged.tiles:
        for pages in arena.split(target, dim=1):
            if held and held + pages.shape[1] > target:
                count = min(held * page_tokens, left)
                yield start, tuple(tile), count
                start, left, tile, held = start + count, left - count, [], 0
            if left > held * page_tokens:
                tile.append(pages)
                held += pages.shape[1]
    if held:
        yield start, tuple(tile), left


def _scores(
    q: Tensor,
    paged: PagedPast,
    pages: tuple[Tensor, ...],
    start: int,
    count: int,
    key_folds: dict[Reader, tuple[Tensor, Tensor]],
    stored: dict[int, Tensor],
) -> Tensor:
    """Scores ``[B, H, Q, S]`` of the queries against one tile."""
    parts = []
    for reader in paged.key_readers:
        u = _stored_once(reader, pages, count, stored)
        if reader in key_folds:
            folded, constant = key_folds[reader]
            flat = folded.flatten(1, 2) @ u.transpose(1, 2)
            parts.append(flat.view(*folded.shape[:3], -1) + constant)
        else:
            keys = _decode_keys(reader, paged, u, start)
            parts.append(pick(q, reader.heads) @ keys.transpose(2, 3))
    order = [head for reader in paged.key_readers for head in reader.heads]
    scores = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    return scores if order == sorted(order) else scores[:, torch.argsort(torch.tensor(order))]


def _decode_keys(reader: Reader, paged: PagedPast, u: Tensor, start: int) -> Tensor:
    """Keys after RoPE ``[B, len(heads), S, D]`` of a tile's stored values ``[B, S, R]``."""
    keys = reader.decode(u).unflatten(-1, (len(reader.heads), -1)).transpose(1, 2)
    if paged.rotary is None or reader.rotated:
        return keys
    positions = paged.token_index(start, u.shape[1]) - paged.offset[:, None]
    return paged.rotary.rotate(keys, positions)


def _stored_once(reader: Reader, pages: tuple[Tensor, ...], count: int, stored: dict[int, Tensor]) -> Tensor:
    """Unpack a segment once per tile, also when it holds both keys and values."""
    if reader.segment.offset not in stored:
        stored[reader.segment.offset] = reader.restored(*pages)[:, :count]
    return stored[reader.segment.offset]


def _sums_latents(q: Tensor, reader: Reader) -> bool:
    """Whether summing latents takes fewer multiplications per token and head than decoding the tile."""
    rows, head_dim, latents = q.shape[2], q.shape[3], reader.segment.latents
    return reader.affine is not None and rows * latents < latents * head_dim + rows * head_dim


def _folds_keys(q: Tensor, reader: Reader, paged: PagedPast) -> bool:
    return paged.rotary is None and _sums_latents(q, reader)


def _fold_query(q: Tensor, reader: Reader) -> tuple[Tensor, Tensor]:
    """Queries in latent space ``[B, h, Q, R]`` and the constant that the decoder's bias adds to their scores."""
    assert reader.affine is not None
    matrix, bias = reader.affine
    own = pick(q, reader.heads)
    matrix = matrix.view(matrix.shape[0], len(reader.heads), -1).permute(1, 2, 0)
    return own @ matrix, own @ bias.view(len(reader.heads), -1, 1)
