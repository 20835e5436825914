"""Attention over pages tile by tile with an online softmax; the past's keys and values never exist at once.

Keys are decoded a tile at a time and rotated. Values are summed as latents and decoded once per query where that
takes fewer multiplications than decoding the tile (one query token: nearly always). Keys of models without rotary
positions are not decoded either where their decoder is affine: it folds into the query.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .inputs import ExactPast, PagedPast, Reader

_SHORTEST_TILE = 512
_LONGEST_TILE = 4096
_SCORES_AT_ONCE = 2**21


def attend(
    query: Tensor, exact: ExactPast, paged: PagedPast | None, scaling: float, softcap: float | None = None
) -> Tensor:
    """Same as ``naive.attend``."""
    batch, query_heads, tokens, head_dim = query.shape
    heads = exact.keys.shape[1]
    # Query heads that share a KV head become more query rows of it: [B, H, G * T, D].
    q = query.float().reshape(batch, heads, -1, head_dim) * scaling
    mask = None
    if exact.mask is not None:
        groups = query_heads // heads
        # [B, 1, T, S] -> [B, 1, G * T, S]; one query token needs no copy.
        mask = exact.mask if tokens == 1 else exact.mask.repeat(1, 1, groups, 1)
    state = _OnlineSoftmax(q, softcap)
    state.add(q @ exact.keys.float().transpose(2, 3), mask, exact.values.float())
    if paged is not None:
        _add_pages(state, q, paged)
    return state.result().reshape(batch, query_heads, tokens, head_dim).to(query.dtype)


class _OnlineSoftmax:
    """Running maximum, mass and weighted sums of a softmax that is seen piece by piece.

    Source: Milakov and Gimelshein 2018 (arXiv 1805.02867); FlashAttention (arXiv 2205.14135).
    """

    def __init__(self, q: Tensor, softcap: float | None) -> None:
        lead = q.shape[:-1]
        self._softcap = softcap
        self._most = torch.full((*lead, 1), -torch.inf, device=q.device)
        self._mass = torch.zeros(*lead, 1, device=q.device)
        self._sum = torch.zeros_like(q)
        self._latent: dict[Reader, tuple[Tensor, Tensor]] = {}

    def add(self, scores: Tensor, mask: Tensor | None, values: Tensor) -> None:
        """Take in scores ``[B, H, Q, S]``, their mask, and values ``[B, H, S, D]``."""
        self._sum += self.weights(scores, mask) @ values

    def weights(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        """Unnormalised weights of a piece, all earlier sums rescaled to the new maximum."""
        if self._softcap is not None:
            scores = self._softcap * torch.tanh(scores / self._softcap)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        most = torch.maximum(self._most, scores.amax(-1, keepdim=True))
        # A row that has seen nothing yet has no maximum; 0 keeps its weights at exp(-inf) = 0.
        anchor = most.masked_fill(most == -torch.inf, 0.0)
        rescale = torch.exp(self._most - anchor)
        weights = torch.exp(scores - anchor)
        self._most = most
        self._mass = self._mass * rescale + weights.sum(-1, keepdim=True)
        self._sum *= rescale
        for reader, (latents, mass) in self._latent.items():
            own = _pick(rescale, reader.heads)
            latents *= own
            mass *= own
        return weights

    def add_decoded(self, weights: Tensor, heads: tuple[int, ...], values: Tensor) -> None:
        """Sum values ``[B, len(heads), S, D]`` of some heads under weights ``[B, H, Q, S]``."""
        if heads == tuple(range(weights.shape[1])):
            self._sum += weights @ values
        else:
            self._sum[:, list(heads)] += weights[:, list(heads)] @ values

    def add_latents(self, weights: Tensor, reader: Reader, stored: Tensor) -> None:
        """Sum stored values ``[B, S, R]`` under the weights of the reader's heads."""
        own = _pick(weights, reader.heads)
        flat = own.flatten(1, 2) @ stored
        latents, mass = flat.view(*own.shape[:3], -1), own.sum(-1, keepdim=True)
        if reader in self._latent:
            before = self._latent[reader]
            latents, mass = before[0] + latents, before[1] + mass
        self._latent[reader] = (latents, mass)

    def result(self) -> Tensor:
        """Normalised output ``[B, H, Q, D]``; rows that saw nothing are 0."""
        for reader, (latents, mass) in self._latent.items():
            assert reader.affine is not None
            matrix, bias = reader.affine
            matrix = matrix.view(matrix.shape[0], len(reader.heads), -1).transpose(0, 1)
            decoded = latents @ matrix + mass * bias.view(len(reader.heads), 1, -1)
            self._sum[:, list(reader.heads)] += decoded
        return self._sum / self._mass.clamp_min(torch.finfo(torch.float32).tiny)


def _add_pages(state: _OnlineSoftmax, q: Tensor, paged: PagedPast) -> None:
    key_folds = {reader: _fold_query(q, reader) for reader in paged.key_readers if _folds_keys(q, reader, paged)}
    for start, pages, count in _tiles(paged, q.shape[1] * q.shape[2]):
        stored: dict[int, Tensor] = {}
        scores = _scores(q, paged, pages, start, count, key_folds, stored)
        visible = paged.visible(start, count)
        weights = state.weights(scores, None if visible is None else visible[:, None, None, :])
        for reader in paged.value_readers:
            u = _stored_once(reader, pages, count, stored)
            if _sums_latents(q, reader):
                state.add_latents(weights, reader, u)
            else:
                values = reader.decode(u).unflatten(-1, (len(reader.heads), -1)).transpose(1, 2)
                state.add_decoded(weights, reader.heads, values)


def _tiles(paged: PagedPast, rows: int) -> Iterator[tuple[int, tuple[Tensor, ...], int]]:
    """First token, pages (in one or several tensors) and number of tokens of every tile that holds any.

    Few query rows take long tiles, so that each operation has enough to do; many rows take short ones, so that
    their scores stay small.
    """
    page_tokens = paged.key_readers[0].segment.page_tokens
    target = max(_SHORTEST_TILE, min(_LONGEST_TILE, _SCORES_AT_ONCE // rows)) // page_tokens
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
            parts.append(_pick(q, reader.heads) @ keys.transpose(2, 3))
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
    own = _pick(q, reader.heads)
    matrix = matrix.view(matrix.shape[0], len(reader.heads), -1).permute(1, 2, 0)
    return own @ matrix, own @ bias.view(len(reader.heads), -1, 1)


def _pick(x: Tensor, heads: tuple[int, ...]) -> Tensor:
    """Some heads of ``[B, H, ...]``, without a copy when they are all of them in order."""
    return x if heads == tuple(range(x.shape[1])) else x[:, list(heads)]
