"""What masks and positions of any form say about padding; what says more than that is refused."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedModelError


def padding_mask(
    given: Any, outer: Tensor | None, shape: tuple[int, ...] | torch.Size, seen: int, kinds: Collection[str]
) -> Tensor | None:
    """Read the padding from what a decoder was given as its mask.

    Args:
        given: None, a mask ``[B, N]`` or ``[B, 1, T, N]``, or a dictionary of masks by kind of layer.
        outer: the mask ``[B, N]`` that a module around the decoder was given in the same pass.
        shape: ``(B, T)`` of the pass.
        seen: tokens of earlier passes.
        kinds: kinds of the layers that may be coded, as the config names them.

    Returns:
        A mask ``[B, N]``, or None where nothing is padded.

    Raises:
        UnsupportedModelError: it is none of these, or not of this pass.
    """
    if isinstance(given, dict):
        own = [mask for kind, mask in given.items() if kind in kinds] or list(given.values())
        given = own[0] if own else None
    if given is None:
        return outer
    if not isinstance(given, Tensor) or given.ndim not in (2, 4):
        raise UnsupportedModelError(
            f"the decoder was given {type(given).__name__} as a mask; a compressed cache reads masks [B, N] and [B, 1, T, N]"
        )
    return given if given.ndim == 2 else _of_rows(given, shape, seen)


def text_positions(given: Any) -> Tensor | None:
    """Positions ``[B, T]`` of tokens that have several kinds of them, all alike; raises UnsupportedModelError where they differ."""
    if given is not None and not isinstance(given, Tensor):
        raise UnsupportedModelError(
            f"position_ids must be a tensor [B, T] of whole numbers, got {type(given).__name__}"
        )
    if given is None or given.ndim < 3:
        return given
    if not bool((given == given[:1]).all()):
        raise UnsupportedModelError(
            "position_ids differ by kind (time, height, width), as those of images do; a compressed cache takes text positions"
        )
    return given[0]


def _of_rows(mask: Tensor, shape: tuple[int, ...] | torch.Size, seen: int) -> Tensor:
    """The padding that the last row of a mask ``[B, 1, T, N]`` shows; attention looks at its other rows itself."""
    (batch, tokens), total = shape, seen + shape[1]
    if mask.shape[2:] != (tokens, total):
        raise UnsupportedModelError(
            f"an attention mask of shape {tuple(mask.shape)} does not cover {seen} cached and {tokens} new tokens of {batch} sequences"
        )
    last = mask[:, 0, -1]
    return (last if last.dtype == torch.bool else last == 0).expand(batch, -1).long()
