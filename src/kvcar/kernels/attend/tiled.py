"""Attention over pages tile by tile with an online softmax; the past's keys and values never exist at once.

In PyTorch, for any device, codec and number of query tokens. Keys are decoded a tile at a time and rotated. Values are
summed as latents and decoded once per query where that takes fewer multiplications than decoding the tile (one query
token: nearly always). Keys of models without rotary positions are not decoded either where their decoder is affine: it
folds into the query.

Many query rows on a CPU (prefill) go to PyTorch's fused attention: keys and values of a tile are decoded, scores never
exist. The fused operation returns the log-sum-exp of its scores, with which a tile joins the others. Where a pass' own tokens see
each other causally and nothing else, it leaves out the half that is hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.weak import WeakTensorKeyDictionary

from .inputs import ATTENTION, ExactPast, PagedPast, Reader, all_heads, pick, turned_keys

FEWEST_FUSED_ROWS = 32
_SHORTEST_TILE = 512
_LONGEST_TILE = 4096
_SCORES_AT_ONCE = 2**21
# Fused, a tile has no scores, and joining its output to what came before costs as much for a short one.
_FUSED_TILE = 2048
_FEWEST_CAUSAL_TOKENS = 128
_NOTHING = -1e30  # log-sum-exp of a row that has seen no token; finite, so that differences are numbers
_FUSED_OPERATION = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


@ATTENTION.register("torch")
@ATTENTION.register("cpu", "chunk")
@ATTENTION.register("triton", "chunk")
def attend(
    query: Tensor,
    exact: ExactPast,
    paged: PagedPast | None,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Compute the same as ``naive.attend``."""
    q, state = _begin(query, exact.joined(), scaling, softcap)
    if sinks is not None:
        state.add_sinks(sinks)
    if paged is not None:
        _add_pages(state, q, paged, softcap)
    return state.result().reshape(query.shape).to(query.dtype)


def tile_tokens(rows: int, fuse: bool) -> int:
    """Choose the tokens of a tile for so many query rows of one sequence, all heads counted.

    Few query rows take long tiles, so that each operation has enough to do; many rows take short ones, so that
    their scores stay small, unless they are fused.
    """
    if fuse:
        return _FUSED_TILE
    return max(_SHORTEST_TILE, min(_LONGEST_TILE, _SCORES_AT_ONCE // rows))


def _begin(query: Tensor, exact: ExactPast, scaling: float, softcap: float | None) -> tuple[Tensor, OnlineSoftmax]:
    """Scale queries, float32 ``[B, H, G * T, D]``, and start a softmax that has seen the exact tokens.

    Query heads that share a KV head become more query rows of it.
    """
    batch, query_heads, tokens, head_dim = query.shape
    heads = exact.keys.shape[1]
    q = query.float().reshape(batch, heads, -1, head_dim) * scaling
    state = OnlineSoftmax(q, softcap)
    keys, values = exact.keys, exact.values
    if _can_fuse(q, softcap):
        past, shown = keys.shape[2] - tokens, None if exact.mask is None else _known(exact.mask)
        # Narrow ones in the model's own dtype, as its own attention would be: 16-bit products take a fraction of the time.
        in_own_dtype = query.dtype == keys.dtype == values.dtype != torch.float32
        own, scale = (query.reshape(q.shape), scaling) if in_own_dtype else (q, 1.0)
        keys, values = keys.to(own.dtype), values.to(own.dtype)
        if shown is not None and shown.own_causal:
            state.merge_output(*_attend_causal(own, keys[:, :, past:], values[:, :, past:], scale))
            keys, values, shown = keys[:, :, :past], values[:, :, :past], shown.past
        if keys.shape[2]:
            state.merge_output(*_attend_fused(own, keys, values, shown, scale))
    else:
        keys, values = keys.float(), values.float()
        # [B, 1, T, S] -> [B, 1, G * T, S]; one query token needs no copy.
        mask = exact.mask if exact.mask is None or tokens == 1 else exact.mask.repeat(1, 1, query_heads // heads, 1)
        state.add(q @ keys.transpose(2, 3), mask, values)
    return q, state


def _add_pages(state: OnlineSoftmax, q: Tensor, paged: PagedPast, softcap: float | None) -> None:
    key_folds = {reader: _fold_query(q, reader) for reader in paged.key_readers if _folds_keys(q, reader, paged)}
    fuse = not key_folds and _can_fuse(q, softcap)
    for start, pages, count in _tiles(paged, tile_tokens(q.shape[1] * q.shape[2], fuse)):
        stored: dict[int, Tensor] = {}
        mask = paged.mask(start, count)
        if fuse:
            shown = None if mask is None else _Shown(mask)
            state.merge_output(*_attend_tile(q, paged, pages, start, count, shown))
            continue
        if mask is not None and mask.shape[2] > 1:
            # Query heads that share a KV head are rows of it: as many times the tokens of the pass.
            mask = mask.repeat(1, 1, q.shape[2] // mask.shape[2], 1)
        weights = state.weights(_scores(q, paged, pages, start, count, key_folds, stored), mask)
        for reader in paged.value_readers:
            u = _restored_once(reader, pages, count, stored)
            if _sums_latents(q, reader):
                state.add_latents(weights, reader, u)
                if reader.means is not None:
                    mass = _mass_of_pages(weights, paged.page_tokens)
                    means = reader.means.of(pages)[:, : mass.shape[-1]].unflatten(-1, (len(reader.heads), -1))
                    state.add_decoded(mass, reader.heads, means.transpose(1, 2))
            else:
                values = reader.vectors(u, pages, slice(count)).unflatten(-1, (len(reader.heads), -1)).transpose(1, 2)
                state.add_decoded(weights, reader.heads, values)


def _tiles(paged: PagedPast, longest: int) -> Iterator[tuple[int, tuple[Tensor, ...], int]]:
    """Yield first token, pages (in one or several tensors) and number of tokens, up to ``longest``, of every tile."""
    page_tokens = paged.page_tokens
    target = max(1, longest // page_tokens)
    start, left, tile, taken = 0, paged.tokens, [], 0
    for arena in paged.tiles:
        for pages in arena.split(target, dim=1):
            if taken and taken + pages.shape[1] > target:
                count = min(taken * page_tokens, left)
                yield start, tuple(tile), count
                start, left, tile, taken = start + count, left - count, [], 0
            if left > taken * page_tokens:
                tile.append(pages)
                taken += pages.shape[1]
    if taken:
        yield start, tuple(tile), left


def _mass_of_pages(weights: Tensor, page_tokens: int) -> Tensor:
    """Sum weights ``[B, H, Q, S]`` of the tokens of every page, the last of which may be partly filled: ``[B, H, Q, pages]``."""
    return pad(weights, (0, -weights.shape[-1] % page_tokens)).unflatten(-1, (-1, page_tokens)).sum(-1)


def _restored_once(reader: Reader, pages: tuple[Tensor, ...], count: int, stored: dict[int, Tensor]) -> Tensor:
    """Unpack a segment once per tile, also when it has both keys and values."""
    if reader.segment.offset not in stored:
        stored[reader.segment.offset] = reader.restored(*pages)[:, :count]
    return stored[reader.segment.offset]


def _scores(
    q: Tensor,
    paged: PagedPast,
    pages: tuple[Tensor, ...],
    start: int,
    count: int,
    key_folds: dict[Reader, tuple[Tensor, Tensor]],
    stored: dict[int, Tensor],
) -> Tensor:
    """Score the queries against one tile, ``[B, H, Q, S]``."""
    parts = []
    for reader in paged.key_readers:
        u = _restored_once(reader, pages, count, stored)
        if reader in key_folds:
            folded, constant = key_folds[reader]
            flat = folded.flatten(1, 2) @ u.transpose(1, 2)
            scores = flat.view(*folded.shape[:3], -1) + constant
            if reader.means is not None:
                means = reader.means.of(pages).unflatten(-1, (len(reader.heads), -1)).permute(0, 2, 3, 1)
                scores += (pick(q, reader.heads) @ means).repeat_interleave(paged.page_tokens, dim=-1)[..., :count]
            parts.append(scores)
        else:
            keys = _rotated_keys(reader, paged, reader.vectors(u, pages, slice(count)), start)
            parts.append(pick(q, reader.heads) @ keys.transpose(2, 3))
    order = [head for reader in paged.key_readers for head in reader.heads]
    scores = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    return scores if order == sorted(order) else scores[:, torch.argsort(torch.tensor(order))]


def _rotated_keys(reader: Reader, paged: PagedPast, vectors: Tensor, start: int) -> Tensor:
    """Rotate a tile's decoded keys ``[B, S, len(heads) * D]`` to ``[B, len(heads), S, D]``."""
    keys = vectors.unflatten(-1, (len(reader.heads), -1)).transpose(1, 2)
    if paged.rotary is None or reader.rotated:
        return keys
    return paged.rotary.rotate(keys, paged.token_index(start, vectors.shape[1]) - paged.offset[:, None])


def _sums_latents(q: Tensor, reader: Reader) -> bool:
    """Whether summing latents takes fewer multiplications per token and head than decoding the tile."""
    rows, head_dim, latents = q.shape[2], q.shape[3], reader.segment.latents
    return reader.is_affine and rows * latents < latents * head_dim + rows * head_dim


def _folds_keys(q: Tensor, reader: Reader, paged: PagedPast) -> bool:
    return paged.rotary is None and _sums_latents(q, reader)


def _fold_query(q: Tensor, reader: Reader) -> tuple[Tensor, Tensor]:
    """Take queries to latent space ``[B, h, Q, R]``; also the constant that the decoder's bias adds to their scores."""
    matrix, bias = reader.matrix_and_bias()
    own = pick(q, reader.heads)
    matrix = matrix.view(matrix.shape[0], len(reader.heads), -1).permute(1, 2, 0)
    return own @ matrix, own @ bias.view(len(reader.heads), -1, 1)


def _can_fuse(q: Tensor, softcap: float | None) -> bool:
    """Whether queries ``[B, H, Q, D]`` are many enough, and PyTorch has an operation for them."""
    return (
        _FUSED_OPERATION is not None and q.device.type == "cpu" and softcap is None and q.shape[2] >= FEWEST_FUSED_ROWS
    )


class _Shown:
    """What queries see, and what the fused operation needs to know of it: found once for all layers of a pass.

    Args:
        mask: bool ``[B or 1, 1, T, S]``, True where a query may attend.
    """

    def __init__(self, mask: Tensor) -> None:
        # The mask itself, or a view that knows it, would keep its entry in the table of those known alive for ever.
        self._mask = mask.detach()

    @cached_property
    def own_causal(self) -> bool:
        """Whether the last ``T`` tokens, those of the pass, see each other causally and nothing of them is hidden otherwise."""
        tokens = self._mask.shape[2]
        if tokens < _FEWEST_CAUSAL_TOKENS:
            return False
        own = self._mask[..., -tokens:]
        return bool((own == torch.ones_like(own[0, 0]).tril()).all())

    @cached_property
    def past(self) -> _Shown | None:
        """What they see of the tokens before those; None for all."""
        past = self._mask[..., : self._mask.shape[3] - self._mask.shape[2]]
        return None if bool(past.all()) else _Shown(past)

    @cached_property
    def added(self) -> Tensor:
        """0 where a query may attend, minus infinity elsewhere, float32 ``[B or 1, 1, T, S]``."""
        return torch.zeros(self._mask.shape, device=self._mask.device, dtype=torch.float32).masked_fill_(
            ~self._mask, -torch.inf
        )

    @cached_property
    def nothing(self) -> Tensor | None:
        """Which queries see nothing, bool ``[B or 1, 1, T, 1]``; None where all see something."""
        nothing = ~self._mask.any(-1, keepdim=True)
        return nothing if bool(nothing.any()) else None


_KNOWN: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _known(mask: Tensor) -> _Shown:
    """What is known of the mask of a pass, which its layers share."""
    if mask not in _KNOWN:
        _KNOWN[mask] = _Shown(mask)
    return _KNOWN[mask]


def _attend_tile(
    q: Tensor, paged: PagedPast, pages: tuple[Tensor, ...], start: int, count: int, shown: _Shown | None
) -> tuple[Tensor, Tensor]:
    """Attend to one tile, fused; see ``_attend_fused``."""
    stored: dict[int, Tensor] = {}

    def vectors(reader: Reader) -> Tensor:
        return reader.vectors(_restored_once(reader, pages, count, stored), pages, slice(count))

    keys = turned_keys(paged, all_heads(paged.key_readers, vectors), start)
    return _attend_fused(q, keys, all_heads(paged.value_readers, vectors), shown)


def _attend_fused(
    q: Tensor, keys: Tensor, values: Tensor, shown: _Shown | None, scaling: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Attend with queries ``[B, H, G * T, D]`` of ``T`` tokens to what is ``shown`` of keys ``[B, H, S, D]``; None for all.

    Returns:
        Output float32 ``[B, H, G * T, D]`` and log-sum-exp of the scores ``[B, H, G * T, 1]``.
    """
    assert _FUSED_OPERATION is not None
    if shown is None:
        output, log_sum = _FUSED_OPERATION(q, keys, values, 0.0, False, scale=scaling)
        return output.float(), log_sum[..., None]
    times = q.shape[2] // shown.added.shape[2] if shown.added.shape[2] > 1 else 1
    added = shown.added.to(q.dtype).repeat(1, 1, times, 1)
    output, log_sum = _FUSED_OPERATION(q, keys, values, 0.0, False, attn_mask=added, scale=scaling)
    output, log_sum = output.float(), log_sum[..., None]
    if shown.nothing is not None:
        # For a row that sees nothing the operation returns 0, both times.
        log_sum = log_sum.masked_fill_(shown.nothing.repeat(1, 1, times, 1), _NOTHING)
    return output, log_sum


def _attend_causal(q: Tensor, keys: Tensor, values: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """The same of as many keys ``[B, H, T, D]`` as queries have tokens, each of which sees itself and those before it."""
    assert _FUSED_OPERATION is not None
    heads, tokens = keys.shape[1:3]
    own = q.unflatten(2, (-1, tokens)).flatten(1, 2)
    groups = own.shape[1] // heads
    keys, values = (side.repeat_interleave(groups, dim=1) for side in (keys, values))
    output, log_sum = _FUSED_OPERATION(own, keys, values, 0.0, True, scale=scaling)
    output, log_sum = (x.unflatten(1, (heads, groups)).flatten(2, 3) for x in (output.float(), log_sum[..., None]))
    return output, log_sum


class OnlineSoftmax:
    """Running maximum, mass and weighted sums of a softmax that is seen piece by piece.

    Source: Milakov and Gimelshein 2018 (arXiv 1805.02867); FlashAttention (arXiv 2205.14135).
    """

    def __init__(self, q: Tensor, softcap: float | None) -> None:
        lead = q.shape[:-1]
        self._softcap = softcap
        self._maximum = torch.full((*lead, 1), -torch.inf, device=q.device, dtype=torch.float32)
        self._mass = torch.zeros(*lead, 1, device=q.device, dtype=torch.float32)
        self._sum = torch.zeros_like(q)
        self._latent: dict[Reader, tuple[Tensor, Tensor]] = {}

    def add(self, scores: Tensor, mask: Tensor | None, values: Tensor) -> None:
        """Take in scores ``[B, H, Q, S]``, which are overwritten, their mask, and values ``[B, H, S, D]``."""
        self._sum += self.weights(scores, mask) @ values

    def weights(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        """Turn a piece's scores into unnormalised weights, in place; rescale earlier sums to the new maximum."""
        if self._softcap is not None:
            scores.div_(self._softcap).tanh_().mul_(self._softcap)
        if mask is not None:
            scores.masked_fill_(~mask, -torch.inf)
        maximum = torch.maximum(self._maximum, scores.amax(-1, keepdim=True))
        # A row that has seen nothing yet has no maximum; 0 keeps its weights at exp(-inf) = 0.
        anchor = maximum.masked_fill(maximum == -torch.inf, 0.0)
        rescale = torch.exp(self._maximum - anchor)
        weights = scores.sub_(anchor).exp_()
        self._maximum = maximum
        self._mass = self._mass * rescale + weights.sum(-1, keepdim=True)
        self._sum *= rescale
        for reader, (latents, mass) in self._latent.items():
            own = pick(rescale, reader.heads)
            latents *= own
            mass *= own
        return weights

    def add_sinks(self, sinks: Tensor) -> None:
        """Take in one score for each query head ``[Hq]`` that no value belongs to."""
        heads, rows = self._maximum.shape[1:3]
        own = sinks.float().repeat_interleave(heads * rows // len(sinks)).view(1, heads, rows, 1)
        self.merge_output(torch.zeros_like(self._sum), own.expand_as(self._maximum))

    def add_decoded(self, weights: Tensor, heads: tuple[int, ...], values: Tensor) -> None:
        """Sum values ``[B, len(heads), S, D]`` of some heads under weights ``[B, H, Q, S]``."""
        if heads == tuple(range(weights.shape[1])):
            self._sum += weights @ values
        else:
            self._sum[:, list(heads)] += weights[:, list(heads)] @ values

    def add_latents(self, weights: Tensor, reader: Reader, stored: Tensor) -> None:
        """Sum stored values ``[B, S, R]`` under the weights of the reader's heads."""
        own = pick(weights, reader.heads)
        flat = own.flatten(1, 2) @ stored
        latents, mass = flat.view(*own.shape[:3], -1), own.sum(-1, keepdim=True)
        if reader in self._latent:
            before = self._latent[reader]
            latents, mass = before[0] + latents, before[1] + mass
        self._latent[reader] = (latents, mass)

    def merge_output(self, output: Tensor, log_sum: Tensor) -> None:
        """Take in attention over other tokens: output ``[B, H, Q, D]`` and log-sum-exp ``[B, H, Q, 1]`` of scores."""
        top = torch.maximum(self._maximum, log_sum)
        mine, theirs = torch.exp(self._maximum - top), torch.exp(log_sum - top)
        self._maximum = top
        self._mass = self._mass * mine + theirs
        self._sum = self._sum * mine + output * theirs
        for reader, (sums, mass) in self._latent.items():
            kept = pick(mine, reader.heads)
            self._latent[reader] = (sums * kept, mass * kept)

    def result(self) -> Tensor:
        """Decode and normalise the output ``[B, H, Q, D]``; rows that saw nothing are 0."""
        for reader, (latents, mass) in self._latent.items():
            matrix, bias = reader.matrix_and_bias()
            matrix = matrix.view(matrix.shape[0], len(reader.heads), -1).transpose(0, 1)
            decoded = latents @ matrix + mass * bias.view(len(reader.heads), 1, -1)
            self._sum[:, list(reader.heads)] += decoded
        return self._sum / self._mass.clamp_min(torch.finfo(torch.float32).tiny)
