"""The contract of a codec: four methods, pure PyTorch, no knowledge of pages, bits or models."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Self

from torch import Tensor

from ..errors import InputError
from ..registry import Registry
from .checks import Stored, checked

if TYPE_CHECKING:
    from ..kernels.attend import RoundedDecoder
    from .trainable import TrainableCodec

CODECS: Registry[type[Codec]] = Registry("codec")


class Codec(ABC):
    """Maps vectors ``[..., W]`` of a block (keys before RoPE) to latents ``[..., R]`` and back, in float32."""

    name: ClassVar[str]
    stored: ClassVar[Mapping[str, Stored]]
    """What a bundle stores; ``W`` in shapes is the width, ``R`` the latents."""

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """Latents ``[..., R]`` float32 of ``x`` ``[..., W]`` float32."""

    @abstractmethod
    def decode(self, z: Tensor) -> Tensor:
        """Reconstruction ``[..., W]`` float32 of latents ``[..., R]`` float32."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Everything that a bundle has to store, by name; ``from_tensors`` takes it back."""

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], width: int, latents: int) -> Self:
        """Rebuild from stored tensors.

        Raises:
            BundleError: they are not those of ``stored`` for ``width`` (W) and ``latents`` (R).
        """
        return cls.rebuilt(checked(tensors, cls.stored, W=width, R=latents))

    @classmethod
    @abstractmethod
    def rebuilt(cls, tensors: Mapping[str, Tensor]) -> Self:
        """Rebuild from tensors that are those of ``stored``."""

    def affine_decoder(self) -> tuple[Tensor, Tensor] | None:
        """Matrix ``[R, W]`` and bias ``[W]`` when decoding is affine; attention then sums values in latent space."""
        return None

    def rounded_decoder(self) -> RoundedDecoder | None:
        """The affine decoder in 8 bits as it lies in memory, of all slots of the block, where it is one."""
        return None

    @property
    def knows_cost(self) -> bool:
        """Whether ``error_cost`` is known."""
        return False

    def error_cost(self, error: Tensor) -> Tensor:
        """What errors ``[..., W]`` of vectors cost, in nats ``[...]``; raises NotImplementedError where it is not known."""
        raise NotImplementedError

    def mean_scale(self) -> Tensor | None:
        """How large the mean error of a page is in each element beside the others, ``[W]``; None where pages store none."""
        return None

    def affine_encoder(self) -> tuple[Tensor, Tensor] | None:
        """Matrix ``[W, R]`` and centre ``[W]`` when latents are ``(x - centre) @ matrix``, for kernels that fuse it."""
        return None

    def trainable(self) -> TrainableCodec:
        """A module that starts as this codec and can be trained.

        Raises:
            InputError: there is nothing in this codec to train.
        """
        raise InputError(f"the {self.name} codec has nothing to train; fit a linear or autoencoder bundle")
