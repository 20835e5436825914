"""Triton code that every kernel with scores shares."""
# pyright: basic, reportOperatorIssue=false, reportArgumentType=false
# No "from __future__ import annotations": Triton reads the annotations of jitted functions.

import triton
import triton.language as tl


@triton.jit
def softcapped(score, softcap, HAS_CAP: tl.constexpr):
    """``softcap * tanh(score / softcap)``, or the score itself."""
    if HAS_CAP:
        # tanh(x) = 1 - 2 / (exp(2 x) + 1), which is right at both ends too.
        score = softcap * (1.0 - 2.0 / (tl.exp(2.0 * score / softcap) + 1.0))
    return score


@triton.jit
def anchor_of(most):
    """What to subtract from scores: their maximum, or 0 where nothing was seen, so that weights are exp(-inf) = 0."""
    return tl.where(most == float("-inf"), 0.0, most)
