"""Passes of several sizes through a cache, and how far apart two results are."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

KERNELS = ["cpu", "torch", "naive"]
# The extra triton is not among the core dependencies that tests of caches run with too.
EVERY_KERNEL = [*KERNELS, *(["triton"] if find_spec("triton") else [])]

SIZES = (70, 1, 60, 1, 1, 50, 1)
"""Tokens of passes that end inside pages, at their ends and beyond them."""


def logits(model: PreTrainedModel, ids: Tensor, cache: Cache, sizes: tuple[int, ...] = SIZES, **given: Any) -> Tensor:
    """Logits of the first tokens of ``ids``, in passes of ``sizes`` tokens."""
    parts = ids[:, : sum(sizes)].split(sizes, dim=1)
    with torch.no_grad():
        return torch.cat([model(part, past_key_values=cache, **given).logits for part in parts], dim=1)


def error(got: Tensor, expected: Tensor) -> float:
    """The root mean square of differences, as a share of the spread of what is expected."""
    return float((got - expected).square().mean().sqrt() / expected.std())
