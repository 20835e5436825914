"""The inputs of encoding into pages, the same for every implementation; the counterpart of attention's ``Reader``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import InputError
from ...layout import SegmentLayout
from ..backend import Operation

ENCODING = Operation("encoding", __package__ or "")


class AffineEncoder(NamedTuple):
    """``(x - centre) @ matrix``, then ``(z - zero) / scale`` rounded; float32 ``[W, R]``, ``[W]``, ``[R]``, ``[R]``."""

    matrix: Tensor
    centre: Tensor
    scale: Tensor
    zero: Tensor


@dataclass(frozen=True, eq=False)
class Writer:
    """How vectors of one unit become its segment of a page.

    Attributes:
        segment: where the unit lies in a page.
        encode: vectors float32 ``[..., W]`` to latents float32 ``[..., R]``; None when the segment is lossless.
        codes: latents to stored values float32 ``[..., S]``; None when the segment is lossless.
        affine: ``encode`` and ``codes`` as one affine map that is rounded and clamped to the latents' bits; None
            when the encoder is no such map in memory or the scales are dynamic.
        exact_dtype: dtype of the elements of a lossless segment.
        steps: scale and zero float32 ``[R]`` of ``codes``, as in ``AffineEncoder``; None when the scales are dynamic.
    """

    segment: SegmentLayout
    encode: Callable[[Tensor], Tensor] | None
    codes: Callable[[Tensor], Tensor] | None
    affine: AffineEncoder | None
    exact_dtype: torch.dtype
    steps: tuple[Tensor, Tensor] | None = None


def check_pages(x: Tensor, writer: Writer) -> int:
    """Count the pages that ``x`` ``[B, N, W]`` fills.

    Raises:
        InputError: its tokens are no whole number of pages.
    """
    pages, rest = divmod(x.shape[1], writer.segment.page_tokens)
    if rest:
        raise InputError(
            f"got {x.shape[1]} tokens to encode, expected a multiple of the {writer.segment.page_tokens} of a page; "
            "fill the last page up first"
        )
    return pages
