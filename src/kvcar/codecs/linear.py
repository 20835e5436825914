"""The linear codec: an affine encoder and decoder, in closed form a PCA under a diagonal metric."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

from torch import Tensor

from .base import CODECS, Codec
from .checks import take


@CODECS.register("linear")
class LinearCodec(Codec):
    """``z = (x - mean) @ encoder`` and ``x = z @ decoder + mean``.

    Args:
        mean: ``[W]`` float32.
        encoder: ``[W, R]`` float32.
        decoder: ``[R, W]`` float32.
    """

    name = "linear"

    def __init__(self, mean: Tensor, encoder: Tensor, decoder: Tensor) -> None:
        self.mean, self.encoder, self.decoder = mean, encoder, decoder

    def encode(self, x: Tensor) -> Tensor:
        """See ``Codec``."""
        return (x - self.mean) @ self.encoder

    def decode(self, z: Tensor) -> Tensor:
        """See ``Codec``."""
        return z @ self.decoder + self.mean

    def affine_decoder(self) -> tuple[Tensor, Tensor]:
        """The decoder is affine as it stands."""
        return self.decoder, self.mean

    def tensors(self) -> dict[str, Tensor]:
        """See ``Codec``."""
        return {"mean": self.mean, "encoder": self.encoder, "decoder": self.decoder}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], width: int, latents: int) -> Self:
        """See ``Codec``."""
        return cls(
            mean=take(tensors, "mean", width),
            encoder=take(tensors, "encoder", width, latents),
            decoder=take(tensors, "decoder", latents, width),
        )
