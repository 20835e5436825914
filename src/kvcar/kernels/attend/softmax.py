"""A softmax over pieces of the past that are seen one after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from . import fused
from .inputs import ExactPast, Reader, pick


def begin(query: Tensor, exact: ExactPast, scaling: float, softcap: float | None) -> tuple[Tensor, OnlineSoftmax]:
    """Scaled queries float32 ``[B, H, G * T, D]`` and a softmax that has seen the tokens held exactly.

    Query heads that share a KV head become more query rows of it.
    """
    batch, query_heads, tokens, head_dim = query.shape
    heads = exact.keys.shape[1]
    q = query.float().reshape(batch, heads, -1, head_dim) * scaling
    mask = None
    if exact.mask is not None:
        # [B, 1, T, S] -> [B, 1, G * T, S]; one query token needs no copy.
        mask = exact.mask if tokens == 1 else exact.mask.repeat(1, 1, query_heads // heads, 1)
    state = OnlineSoftmax(q, softcap)
    if fused.serves(q, softcap):
        state.merge_output(*fused.attend_exact(q, exact, mask))
        return q, state
    state.add(q @ exact.keys.float().transpose(2, 3), mask, exact.values.float())
    return q, state


class OnlineSoftmax:
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
        """Take in scores ``[B, H, Q, S]``, which are overwritten, their mask, and values ``[B, H, S, D]``."""
        self._sum += self.weights(scores, mask) @ values

    def weights(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        """Unnormalised weights of a piece, in the place of its scores; all earlier sums rescaled to the new maximum."""
        if self._softcap is not None:
            scores.div_(self._softcap).tanh_().mul_(self._softcap)
        if mask is not None:
            scores.masked_fill_(~mask, -torch.inf)
        most = torch.maximum(self._most, scores.amax(-1, keepdim=True))
        # A row that has seen nothing yet has no maximum; 0 keeps its weights at exp(-inf) = 0.
        anchor = most.masked_fill(most == -torch.inf, 0.0)
        rescale = torch.exp(self._most - anchor)
        weights = scores.sub_(anchor).exp_()
        self._most = most
        self._mass = self._mass * rescale + weights.sum(-1, keepdim=True)
        self._sum *= rescale
        for reader, (latents, mass) in self._latent.items():
            own = pick(rescale, reader.heads)
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
        own = pick(weights, reader.heads)
        flat = own.flatten(1, 2) @ stored
        latents, mass = flat.view(*own.shape[:3], -1), own.sum(-1, keepdim=True)
        if reader in self._latent:
            before = self._latent[reader]
            latents, mass = before[0] + latents, before[1] + mass
        self._latent[reader] = (latents, mass)

    def merge_output(self, output: Tensor, log_sum: Tensor) -> None:
        """Take in attention over other tokens: its output ``[B, H, Q, D]`` and log-sum-exp of scores ``[B, H, Q, 1]``."""
        top = torch.maximum(self._most, log_sum)
        mine, theirs = torch.exp(self._most - top), torch.exp(log_sum - top)
        self._most = top
        self._mass = self._mass * mine + theirs
        self._sum = self._sum * mine + output * theirs
        for reader, (sums, mass) in self._latent.items():
            kept = pick(mine, reader.heads)
            self._latent[reader] = (sums * kept, mass * kept)

    def result(self) -> Tensor:
        """Normalised output ``[B, H, Q, D]``; rows that saw nothing are 0."""
        for reader, (latents, mass) in self._latent.items():
            assert reader.affine is not None
            matrix, bias = reader.affine
            matrix = matrix.view(matrix.shape[0], len(reader.heads), -1).transpose(0, 1)
            decoded = latents @ matrix + mass * bias.view(len(reader.heads), 1, -1)
            self._sum[:, list(reader.heads)] += decoded
        return self._sum / self._mass.clamp_min(torch.finfo(torch.float32).tiny)
