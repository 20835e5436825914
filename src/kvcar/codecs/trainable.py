"""The form of a codec that trains: a module whose parameters fall into an encoder's and a decoder's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

from torch import Tensor, nn

from .base import Codec


class TrainableCodec(nn.Module, ABC):
    """Computes what a ``Codec`` does, differentiably. Inputs are ``[N, W]``, latents ``[N, R]``, all float32."""

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """Latents of ``x``."""

    @abstractmethod
    def decode(self, z: Tensor) -> Tensor:
        """Reconstruction of latents."""

    @abstractmethod
    def freeze(self) -> Codec:
        """The codec as it stands now, in tensors of its own."""

    @abstractmethod
    def encoder_parameters(self) -> Iterable[nn.Parameter]:
        """What stage (b) of the paper's Algorithm 1 trains."""

    @abstractmethod
    def decoder_parameters(self) -> Iterable[nn.Parameter]:
        """The rest."""
