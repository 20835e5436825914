"""The paper's autoencoder: Linear, BatchNorm, LeakyReLU, Linear, and its mirror as the decoder.

Source: KV-CAR (arXiv 2512.06727), part 1. BatchNorm and the input's normalisation are affine at inference, so they
are folded into the linear maps before a bundle is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from .base import CODECS, Codec
from .checks import Stored
from .trainable import TrainableCodec

LEAKY_SLOPE = 0.01


@dataclass(frozen=True)
class FoldedHalf:
    """One half of the autoencoder after folding: ``leaky_relu(x @ first + bias) @ second + bias``."""

    first: Tensor
    first_bias: Tensor
    second: Tensor
    second_bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Apply to ``[..., in]``, giving ``[..., out]``."""
        hidden = nn.functional.leaky_relu(x @ self.first + self.first_bias, LEAKY_SLOPE)
        return hidden @ self.second + self.second_bias

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """Named tensors for a bundle."""
        return {f"{prefix}.{name}": getattr(self, name) for name in self.__dataclass_fields__}

    @classmethod
    def rebuilt(cls, tensors: Mapping[str, Tensor], prefix: str) -> FoldedHalf:
        """Undo ``tensors``."""
        return cls(**{name: tensors[f"{prefix}.{name}"] for name in cls.__dataclass_fields__})

    @classmethod
    def stored(cls, prefix: str, width_in: str, hidden: str, width_out: str) -> dict[str, Stored]:
        """What ``tensors`` are, each size a letter; the hidden width is whatever the first map has."""
        shapes = (width_in + hidden, hidden, hidden + width_out, width_out)
        return {f"{prefix}.{name}": Stored(s) for name, s in zip(cls.__dataclass_fields__, shapes, strict=True)}


@CODECS.register("autoencoder")
class AutoencoderCodec(Codec):
    """Inference form of the paper's autoencoder; ``AutoencoderModule`` is the form that trains."""

    name = "autoencoder"
    stored = FoldedHalf.stored("encoder", "W", "h", "R") | FoldedHalf.stored("decoder", "R", "H", "W")

    def __init__(self, encoder: FoldedHalf, decoder: FoldedHalf) -> None:
        self._encoder, self._decoder = encoder, decoder

    def encode(self, x: Tensor) -> Tensor:
        """See ``Codec``."""
        return self._encoder(x)

    def decode(self, z: Tensor) -> Tensor:
        """See ``Codec``; not affine, so values are decoded tile by tile rather than summed as latents."""
        return self._decoder(z)

    def tensors(self) -> dict[str, Tensor]:
        """See ``Codec``."""
        return self._encoder.tensors("encoder") | self._decoder.tensors("decoder")

    @classmethod
    def rebuilt(cls, tensors: Mapping[str, Tensor]) -> Self:
        """See ``Codec``."""
        return cls(FoldedHalf.rebuilt(tensors, "encoder"), FoldedHalf.rebuilt(tensors, "decoder"))

    def trainable(self) -> TrainableCodec:
        """See ``Codec``; BatchNorm stays folded, so batches need not be large."""
        return TrainableFolded(self._encoder, self._decoder)


class TrainableFolded(TrainableCodec):
    """The autoencoder in training with its BatchNorm folded into the linear maps."""

    def __init__(self, encoder: FoldedHalf, decoder: FoldedHalf) -> None:
        super().__init__()
        self.encoder = _as_parameters(encoder)
        self.decoder = _as_parameters(decoder)

    def encode(self, x: Tensor) -> Tensor:
        """See ``TrainableCodec``."""
        return FoldedHalf(**dict(self.encoder.items()))(x)

    def decode(self, z: Tensor) -> Tensor:
        """See ``TrainableCodec``."""
        return FoldedHalf(**dict(self.decoder.items()))(z)

    def encoder_parameters(self) -> list[nn.Parameter]:
        """Both maps of the encoder."""
        return list(self.encoder.parameters())

    def decoder_parameters(self) -> list[nn.Parameter]:
        """Both maps of the decoder."""
        return list(self.decoder.parameters())

    @torch.no_grad()
    def freeze(self) -> AutoencoderCodec:
        """See ``TrainableCodec``."""
        halves = ({name: p.detach().clone() for name, p in half.items()} for half in (self.encoder, self.decoder))
        return AutoencoderCodec(*(FoldedHalf(**half) for half in halves))


def _as_parameters(half: FoldedHalf) -> nn.ParameterDict:
    return nn.ParameterDict(
        {name: nn.Parameter(getattr(half, name).detach().clone()) for name in half.__dataclass_fields__}
    )


class AutoencoderModule(TrainableCodec):
    """The trainable autoencoder of one block.

    Args:
        mean, std: ``[W]`` statistics that normalise the input; the output is put back on that scale.
        hidden: width of the hidden layer ``h`` (the paper leaves it free).
        latents: width of the latent ``d`` (the paper uses half of the embedding).
    """

    def __init__(self, mean: Tensor, std: Tensor, hidden: int, latents: int) -> None:
        super().__init__()
        width = len(mean)
        self.mean, self.std = nn.Buffer(mean), nn.Buffer(std)
        self.encoder = _half(width, hidden, latents)
        self.decoder = _half(latents, hidden, width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Latents ``[N, d]`` and reconstruction ``[N, W]`` of ``x`` ``[N, W]``."""
        z = self.encode(x)
        return z, self.decode(z)

    def encode(self, x: Tensor) -> Tensor:
        """See ``TrainableCodec``; BatchNorm wants ``[N, W]``."""
        return self.encoder((x - self.mean) / self.std)

    def decode(self, z: Tensor) -> Tensor:
        """See ``TrainableCodec``."""
        return self.decoder(z) * self.std + self.mean

    def encoder_parameters(self) -> list[nn.Parameter]:
        """The encoder's, BatchNorm included."""
        return list(self.encoder.parameters())

    def decoder_parameters(self) -> list[nn.Parameter]:
        """The decoder's, BatchNorm included."""
        return list(self.decoder.parameters())

    def freeze(self) -> AutoencoderCodec:
        """See ``TrainableCodec``."""
        return self.fold()

    @torch.no_grad()
    def fold(self) -> AutoencoderCodec:
        """The same function in inference mode, BatchNorm and normalisation folded into the linear maps."""
        encoder, decoder = _fold_batch_norm(self.encoder), _fold_batch_norm(self.decoder)
        encoder = FoldedHalf(
            first=encoder.first / self.std[:, None],
            first_bias=encoder.first_bias - (self.mean / self.std) @ encoder.first,
            second=encoder.second,
            second_bias=encoder.second_bias,
        )
        decoder = FoldedHalf(
            first=decoder.first,
            first_bias=decoder.first_bias,
            second=decoder.second * self.std,
            second_bias=decoder.second_bias * self.std + self.mean,
        )
        return AutoencoderCodec(encoder, decoder)


def _half(width_in: int, hidden: int, width_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(width_in, hidden),
        nn.BatchNorm1d(hidden),
        nn.LeakyReLU(LEAKY_SLOPE),
        nn.Linear(hidden, width_out),
    )


def _fold_batch_norm(half: nn.Sequential) -> FoldedHalf:
    first, norm, _, second = half
    assert isinstance(first, nn.Linear)
    assert isinstance(norm, nn.BatchNorm1d)
    assert isinstance(second, nn.Linear)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    gain = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    return FoldedHalf(
        first=(first.weight * gain[:, None]).T.contiguous(),
        first_bias=(first.bias - norm.running_mean) * gain + norm.bias,
        # Copies, never views: training goes on while the best state so far is kept.
        second=second.weight.T.clone(memory_format=torch.contiguous_format),
        second_bias=second.bias.clone(),
    )
