"""What attention over a compressed past is given, the same for every implementation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..layout import SegmentLayout
from ..pack import unpack
from ..rotary import RotaryTable


@dataclass(frozen=True, eq=False)
class Reader:
    """How one unit's segment gives the keys or the values of some KV heads of one layer.

    Attributes:
        segment: where the unit lies in a page.
        heads: KV heads of the layer, in the order of the columns below.
        restore: stored values ``[..., S]`` to what is decoded ``[..., R]``; None when they are the same.
        decode: restored values ``[..., R]`` to ``[..., len(heads) * D]`` float32.
        affine: matrix ``[R, len(heads) * D]`` and bias with which ``decode`` is ``u @ matrix + bias``; None when
            the decoder is not affine or the segment is lossless.
        rotated: keys are stored after RoPE and need no rotation.
        exact_dtype: dtype of the elements of a lossless segment.
    """

    segment: SegmentLayout
    heads: tuple[int, ...]
    restore: Callable[[Tensor], Tensor] | None
    decode: Callable[[Tensor], Tensor]
    affine: tuple[Tensor, Tensor] | None
    rotated: bool
    exact_dtype: torch.dtype

    def stored(self, *pages: Tensor) -> Tensor:
        """Stored values float32 ``[B, N, S]`` of consecutive ``pages`` uint8 ``[B, pages, page_bytes]``."""
        segment = self.segment
        parts = [run[..., segment.offset : segment.end] for run in pages]
        data = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        if segment.lossless:
            u = data.contiguous().view(self.exact_dtype).float()
        else:
            u = unpack(data, segment)
        return u.reshape(data.shape[0], -1, segment.latents)

    def restored(self, *pages: Tensor) -> Tensor:
        """What ``decode`` takes, float32 ``[B, N, R]``, of the same pages."""
        u = self.stored(*pages)
        return u if self.restore is None else self.restore(u)


@dataclass(frozen=True)
class ExactPast:
    """Tokens held exactly: sinks, window and the tokens of this pass.

    Attributes:
        keys, values: ``[B, H, S, D]``, keys after RoPE.
        mask: bool, broadcastable to ``[B, 1, T, S]``, True where a query may attend; None for everywhere.
    """

    keys: Tensor
    values: Tensor
    mask: Tensor | None


@dataclass(frozen=True)
class PagedPast:
    """Tokens held as pages. Token ``i`` of a sequence lies in page ``i // page_tokens``.

    Attributes:
        tiles: consecutive runs of pages, uint8 ``[B, pages, page_bytes]``; the last page may be partly filled.
        tokens: tokens that are really there.
        first: first token of each sequence that is attended here, int64 ``[B]``; those before are padding or sinks.
        first_most: the largest of ``first``, known without asking the device.
        offset: position of token ``i`` is ``i - offset``, int64 ``[B]``.
        key_readers, value_readers: together they give every KV head once.
        rotary: the layer's rotation, or None for models without.
    """

    tiles: Sequence[Tensor]
    tokens: int
    first: Tensor
    first_most: int
    offset: Tensor
    key_readers: tuple[Reader, ...]
    value_readers: tuple[Reader, ...]
    rotary: RotaryTable | None


def pick(x: Tensor, heads: tuple[int, ...]) -> Tensor:
    """Some heads of ``[B, H, ...]``, without a copy when they are all of them in order."""
    return x if heads == tuple(range(x.shape[1])) else x[:, list(heads)]
