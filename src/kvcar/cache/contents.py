"""Everything that a cache holds, as plain tensors: what is written to disk and read back."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

KeysValues = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class UnitContents:
    """Stored values of one unit of the pages.

    Attributes:
        raw: what is no integer code: float16 ``[B, N, raw]`` of a coded unit (dynamic scales, 16-bit latents), or all
            of a lossless one, ``[B, N, W]`` in the exact dtype.
        codes: uint8 ``[B, N, R - raw]``; of a lossless unit without columns.
    """

    raw: Tensor
    codes: Tensor


@dataclass(frozen=True, eq=False)
class CacheContents:
    """What a cache holds between two passes.

    Attributes:
        tokens: tokens seen, padding included (``seen``).
        paged: those of them that lie in pages; the ``tokens - paged`` after them are in the window.
        padding, offset: int64 ``[B]``, see ``SequenceState``.
        units: stored values of the ``paged`` tokens, for every unit of a page in order.
        exact: by coded layer, keys (after RoPE) and values ``[B, H, sinks + window, D]`` in the exact dtype.
        plain: by other layer, keys and values ``[B, H, kept, D]`` in the model's dtype; a sliding layer keeps its window
            less one.
    """

    tokens: int
    paged: int
    padding: Tensor
    offset: Tensor
    units: tuple[UnitContents, ...]
    exact: dict[int, KeysValues]
    plain: dict[int, KeysValues]
