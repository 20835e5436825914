"""The linear codec: an affine encoder and decoder, in closed form a PCA under a diagonal metric."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from .base import CODECS, Codec
from .checks import Stored
from .trainable import TrainableCodec


@CODECS.register("linear")
class LinearCodec(Codec):
    """``z = (x - centre) @ encoder`` and ``x = z @ decoder + mean``.

    Args:
        mean: ``[W]`` float32.
        encoder: ``[W, R]`` float32.
        decoder: ``[R, W]`` float32.
        centre: ``[W]`` float32; the mean unless training has moved the two apart.
    """

    name = "linear"
    stored: ClassVar[Mapping[str, Stored]] = {
        "mean": Stored("W"),
        "encoder": Stored("WR"),
        "decoder": Stored("RW"),
        "centre": Stored("W", optional=True),
    }

    def __init__(self, mean: Tensor, encoder: Tensor, decoder: Tensor, centre: Tensor | None = None) -> None:
        self.mean, self.encoder, self.decoder = mean, encoder, decoder
        self.centre = mean if centre is None else centre

    def encode(self, x: Tensor) -> Tensor:
        """See ``Codec``."""
        return (x - self.centre) @ self.encoder

    def decode(self, z: Tensor) -> Tensor:
        """See ``Codec``."""
        return z @ self.decoder + self.mean

    def affine_decoder(self) -> tuple[Tensor, Tensor]:
        """The decoder is affine as it stands."""
        return self.decoder, self.mean

    def affine_encoder(self) -> tuple[Tensor, Tensor]:
        """The encoder is affine as it stands."""
        return self.encoder, self.centre

    def tensors(self) -> dict[str, Tensor]:
        """See ``Codec``."""
        tensors = {"mean": self.mean, "encoder": self.encoder, "decoder": self.decoder}
        # Only where they differ, so that an untrained bundle stays as small as it was.
        return tensors if self.centre is self.mean else tensors | {"centre": self.centre}

    @classmethod
    def rebuilt(cls, tensors: Mapping[str, Tensor]) -> Self:
        """See ``Codec``."""
        return cls(**tensors)

    def trainable(self) -> TrainableCodec:
        """See ``Codec``."""
        return TrainableLinear(self)


class TrainableLinear(TrainableCodec):
    """A linear codec in training; the mean counts as the decoder's, and the encoder subtracts its first value."""

    def __init__(self, codec: LinearCodec) -> None:
        super().__init__()
        self.encoder = nn.Parameter(codec.encoder.detach().clone())
        self.decoder = nn.Parameter(codec.decoder.detach().clone())
        self.bias = nn.Parameter(codec.mean.detach().clone())
        self.centre = nn.Buffer(codec.mean.detach().clone())

    def encode(self, x: Tensor) -> Tensor:
        """See ``TrainableCodec``."""
        return (x - self.centre) @ self.encoder

    def decode(self, z: Tensor) -> Tensor:
        """See ``TrainableCodec``."""
        return z @ self.decoder + self.bias

    def encoder_parameters(self) -> list[nn.Parameter]:
        """The encoder's matrix."""
        return [self.encoder]

    def decoder_parameters(self) -> list[nn.Parameter]:
        """The decoder's matrix and bias."""
        return [self.decoder, self.bias]

    @torch.no_grad()
    def freeze(self) -> LinearCodec:
        """See ``TrainableCodec``."""
        return LinearCodec(
            mean=self.bias.detach().clone(),
            encoder=self.encoder.detach().clone(),
            decoder=self.decoder.detach().clone(),
            centre=self.centre.detach().clone(),
        )
