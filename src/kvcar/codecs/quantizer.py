"""The static quantiser of a block's latents: ``z ~ scale * u + zero``, one scale and zero per latent.

``u`` is an integer of 0 to ``2**bits - 1`` for packed latents and ``z`` itself, rounded to float16, for raw ones
(scale 1, zero 0). Static scales cost no bytes per token and fold into an affine decoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..errors import BundleError
from ..plan import RAW_BITS, BitGroup
from .checks import take

FLOAT16_MAX = 65504.0


def latent_bits(groups: Sequence[BitGroup]) -> Tensor:
    """Bits of each latent, int64 ``[R]``."""
    return torch.tensor([group.bits for group in groups for _ in range(group.count)], dtype=torch.int64)


class Quantizer:
    """Rounds latents to what pages store.

    Args:
        groups: the block's groups of latents.
        scale: step of each latent, float32 ``[R]``, above 0.
        zero: latent that code 0 stands for, float32 ``[R]``.
    """

    def __init__(self, groups: Sequence[BitGroup], scale: Tensor, zero: Tensor) -> None:
        self.groups = tuple(groups)
        self.scale, self.zero = scale, zero
        bits = latent_bits(groups).to(scale.device)
        self._raw = bits == RAW_BITS
        levels = (2.0**bits - 1).float()
        self._lowest = torch.where(self._raw, -FLOAT16_MAX, 0.0)
        self._highest = torch.where(self._raw, FLOAT16_MAX, levels)

    def codes(self, z: Tensor) -> Tensor:
        """Stored values ``u`` ``[..., R]`` float32 of latents ``z``: whole numbers, or float16-rounded when raw."""
        u = (z - self.zero) / self.scale
        rounded = torch.where(self._raw, u.to(torch.float16).float(), u.round()) if self._raw.any() else u.round()
        return rounded.clamp(self._lowest, self._highest)

    def latents(self, u: Tensor) -> Tensor:
        """Latents ``[..., R]`` that stored values stand for."""
        return u * self.scale + self.zero

    def tensors(self) -> dict[str, Tensor]:
        """What a bundle stores."""
        return {"scale": self.scale, "zero": self.zero}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], groups: Sequence[BitGroup]) -> Quantizer:
        """Rebuild and check.

        Raises:
            BundleError: a tensor is missing, misshapen or not finite, or a scale is not positive.
        """
        count = sum(group.count for group in groups)
        scale, zero = take(tensors, "scale", count), take(tensors, "zero", count)
        if not (scale > 0).all():
            raise BundleError("a quantiser's scale is not positive; the bundle is damaged, fit it again")
        raw = latent_bits(groups) == RAW_BITS
        if not ((scale[raw] == 1).all() and (zero[raw] == 0).all()):
            raise BundleError("a raw latent must have scale 1 and zero 0; the bundle is damaged, fit it again")
        return cls(groups, scale, zero)
