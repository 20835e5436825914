"""What training minimises, in nats per token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_ROWS_AT_ONCE = 64


def kl_divergence(logits: Tensor, full: Tensor) -> Tensor:
    """Mean Kullback-Leibler divergence of next-token distributions, full cache against this; logits ``[B, T, V]``."""
    result = _KLDivergence.apply(logits.flatten(0, -2), full.flatten(0, -2))
    assert isinstance(result, Tensor)
    return result


def cross_entropy(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean negative log-likelihood of the tokens that follow; logits ``[B, T, V]``, ids int64 ``[B, T]``."""
    return torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())


class _KLDivergence(torch.autograd.Function):
    """A few rows at a time, gradient with the value: a vocabulary is wide, and its float32 copies would fill memory."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, full: Tensor) -> Tensor:
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=torch.float64, device=logits.device)
        for start in range(0, len(logits), _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            log_q = torch.log_softmax(logits[rows].float(), dim=-1)
            log_p = torch.log_softmax(full[rows].float(), dim=-1)
            p = log_p.exp()
            total += (p * log_p.sub_(log_q)).sum()
            if gradient is not None:
                gradient[rows] = log_q.exp_().sub_(p).div_(len(logits))
        ctx.gradient = gradient
        return (total / len(logits)).float()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, None]:
        # The scale goes into the incoming gradient only here, so a loss may be weighted.
        return (None if ctx.gradient is None else ctx.gradient * grad_outputs[0]), None
