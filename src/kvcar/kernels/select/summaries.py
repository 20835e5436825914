"""What is kept of a page's keys to tell, without decoding it, how much attention it would get.

All of them answer in the scores' own unit: an estimate, up to a constant, of the logarithm of the attention mass that a
query puts on a page.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from ...registry import Registry


class Summary(ABC):
    """A few vectors for each page and KV head.

    Attributes:
        vectors: how many, each as wide as a head.
        is_product: whether the score is the product of the query and the only vector.
    """

    vectors: ClassVar[int]
    is_product: ClassVar[bool] = False

    @abstractmethod
    def summarise(self, keys: Tensor, visible: Tensor) -> Tensor:
        """Summaries float32 ``[B, H, P, vectors * D]``.

        Args:
            keys: float32 ``[B, H, P, N, D]`` after RoPE, the ``N`` tokens of each of ``P`` pages.
            visible: bool ``[B, 1, P, N, 1]``, which of them are neither padding nor sinks. A page of which none is
                visible gives zeros.
        """

    @abstractmethod
    def scores(self, query: Tensor, summaries: Tensor) -> Tensor:
        """Estimates ``[B, H, Q, P]`` for scaled queries ``[B, H, Q, D]`` after RoPE and summaries, both float32."""


SUMMARIES: Registry[type[Summary]] = Registry("page summary")


@SUMMARIES.register("mean")
class Mean(Summary):
    """The mean key: a page gets what its tokens' scores are on average."""

    vectors = 1
    is_product = True

    def summarise(self, keys: Tensor, visible: Tensor) -> Tensor:
        """See ``Summary``."""
        return (keys * visible).sum(3) / visible.sum(3).clamp_min(1)

    def scores(self, query: Tensor, summaries: Tensor) -> Tensor:
        """See ``Summary``."""
        return query @ summaries.transpose(2, 3)


@SUMMARIES.register("midrange")
class Midrange(Summary):
    """Halfway between the smallest and the largest of every element.

    The few keys that stand out, which attention goes to, move it further than they move a mean.
    """

    vectors = 1
    is_product = True

    def summarise(self, keys: Tensor, visible: Tensor) -> Tensor:
        """See ``Summary``."""
        low, high = _bounds(keys, visible)
        return (low + high) / 2

    def scores(self, query: Tensor, summaries: Tensor) -> Tensor:
        """See ``Summary``."""
        return query @ summaries.transpose(2, 3)


@SUMMARIES.register("bounds")
class Bounds(Summary):
    """Smallest and largest of every element; the score is an upper bound of every token's.

    Source: Tang et al. 2024, Quest (arXiv 2406.10774).
    """

    vectors = 2

    def summarise(self, keys: Tensor, visible: Tensor) -> Tensor:
        """See ``Summary``."""
        return torch.cat(_bounds(keys, visible), dim=-1)

    def scores(self, query: Tensor, summaries: Tensor) -> Tensor:
        """See ``Summary``. For every element the larger product: with the largest key where the query is positive."""
        signed = torch.cat([query.clamp_max(0), query.clamp_min(0)], dim=-1)
        return signed @ summaries.transpose(2, 3)


@SUMMARIES.register("range")
class Range(Summary):
    """Midrange, and half the range of every element.

    The score is the midrange's and half the root of the summed squares of ``query * half range``: how far scores of
    single tokens may lie above it if elements vary independently, where ``bounds`` adds up their worst cases.
    """

    vectors = 2

    def summarise(self, keys: Tensor, visible: Tensor) -> Tensor:
        """See ``Summary``."""
        low, high = _bounds(keys, visible)
        return torch.cat([low + high, high - low], dim=-1) / 2

    def scores(self, query: Tensor, summaries: Tensor) -> Tensor:
        """See ``Summary``."""
        middle, half = summaries.transpose(2, 3).chunk(2, dim=2)
        return query @ middle + 0.5 * (query.square() @ half.square()).sqrt()


CHOSEN_SUMMARY = "midrange"


def _bounds(keys: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest visible keys ``[B, H, P, D]``."""
    low = keys.masked_fill(~visible, torch.inf).amin(3)
    high = keys.masked_fill(~visible, -torch.inf).amax(3)
    nothing = ~visible.any(3)
    return low.masked_fill(nothing, 0.0), high.masked_fill(nothing, 0.0)
