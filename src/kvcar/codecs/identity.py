"""The identity codec: latents are the block's own elements. Lossless without bits, a plain quantiser with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor

from ..errors import BundleError
from .base import CODECS, Codec


@CODECS.register("identity")
class IdentityCodec(Codec):
    """Latent ``i`` is element ``order[i]`` of the block, so that latents can fall in bits as the format asks."""

    name = "identity"

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
        matrix = torch.eye(width, device=self._order.device)[self._order]
        return matrix, torch.zeros(width, device=self._order.device)

    def tensors(self) -> dict[str, Tensor]:
        """The order, int32 ``[W]``."""
        return {"order": self._order.to(torch.int32)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], width: int, latents: int) -> Self:
        """See ``Codec``; a lossless block stores no tensor and keeps the order."""
        if not tensors:
            return cls(torch.arange(width))
        order = tensors.get("order")
        if latents != width or order is None or order.shape != (width,):
            raise BundleError(f"an identity block of width {width} needs that many latents and an order, got {latents}")
        if not torch.equal(order.long().sort().values.cpu(), torch.arange(width)):
            raise BundleError(f"the order of an identity block must be a permutation of {width} elements")
        return cls(order.long())
