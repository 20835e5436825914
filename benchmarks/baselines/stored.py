"""What a method would store: integer codes of a few bits and 16-bit numbers, nothing else."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

HALF_BITS = 16


@dataclass(frozen=True)
class Codes:
    """Whole numbers of 0 to ``2**bits - 1``, as int64 of any shape, that would be packed at ``bits`` each."""

    values: Tensor
    bits: int


@dataclass(frozen=True)
class Stored:
    """Everything from which some tokens are decoded.

    Attributes:
        codes: packed whole numbers.
        halves: float16 tensors: scales, zero points, norms, latents that are not quantised.
    """

    codes: tuple[Codes, ...] = ()
    halves: tuple[Tensor, ...] = ()

    @property
    def bits(self) -> int:
        """Bits of all codes, packed without gaps, and of all 16-bit numbers."""
        codes = sum(each.values.numel() * each.bits for each in self.codes)
        return codes + HALF_BITS * sum(half.numel() for half in self.halves)

    def packed(self) -> bytes:
        """The bytes themselves: each tensor of codes packed to its bits, then the halves as they lie in memory."""
        parts = [_pack(each) for each in self.codes]
        parts += [half.contiguous().cpu().numpy().tobytes() for half in self.halves]
        return b"".join(parts)


def to_half(x: Tensor) -> Tensor:
    """Float16, kept finite: what is stored as a 16-bit number."""
    largest = torch.finfo(torch.float16).max
    return x.clamp(-largest, largest).to(torch.float16)


def _pack(codes: Codes) -> bytes:
    values = codes.values.reshape(-1, 1).cpu().numpy().astype(np.uint8)
    return np.packbits(np.unpackbits(values, axis=1)[:, 8 - codes.bits :]).tobytes()
