"""The identity codec: latents are the block's own elements. Lossless without bits, a plain quantiser with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Self

import torch
from torch import Tensor

from ..errors import BundleError
from .base import CODECS, Codec
from .checks import Stored


@CODECS.register("identity")
class IdentityCodec(Codec):
    """Latent ``i`` is element ``order[i]`` of the block, so that latents can fall in bits as the format asks."""

    name = "identity"
    stored: ClassVar[Mapping[str, Stored]] = {"order": Stored("W", torch.int32)}

    def __init__(self, order: Tensor) -> None:
        self._order = order
        self._inverse = torch.argsort(order)

    def encode(self, x: Tensor) -> Tensor:
        """Reorder."""
        return x[..., self._order]

    def decode(self, z: Tensor) -> Tensor:
        """Undo the reordering."""
        return z[..., self._inverse]

    def affine_decoder(self) -> tuple[Tensor, Tensor]:
        """The permutation as a matrix."""
        width = len(self._order)
        matrix = torch.eye(width, device=self._order.device, dtype=torch.float32)[self._order]
        return matrix, torch.zeros(width, device=self._order.device, dtype=torch.float32)

    def tensors(self) -> dict[str, Tensor]:
        """The order, int32 ``[W]``."""
        return {"order": self._order.to(torch.int32)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], width: int, latents: int) -> Self:
        """See ``Codec``."""
        if latents != width:
            raise BundleError(f"an identity block of width {width} needs that many latents, got {latents}")
        return super().from_tensors(tensors, width, latents)

    @classmethod
    def rebuilt(cls, tensors: Mapping[str, Tensor]) -> Self:
        """See ``Codec``."""
        order = tensors["order"].long()
        if not torch.equal(order.sort().values.cpu(), torch.arange(len(order))):
            raise BundleError(f"the order of an identity block must be a permutation of {len(order)} elements")
        return cls(order)
