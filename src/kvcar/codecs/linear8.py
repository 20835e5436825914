"""The linear codec in 8 bits: one matrix, the decoder, and the metric from which the encoder follows.

Under a metric ``M`` (what an error costs, block-diagonal over sides) the latents of a vector ``x`` are those that cost least,
``argmin (x - mean - z A)' M (x - mean - z A)``, so that an encoder beside the decoder ``A`` would store nothing new. Decoder
and metric are rounded to 8 bits. As latents are the best ones for the rounded decoder, its rounding costs next to nothing
(0.1 % of the error where it was measured), and what attention multiplies by is what was fitted.

Rows of the rounded decoder are nearly orthogonal under the metric, but a few latents are so large that the little they
share with the others would drown those: what these strong latents share with the rest is stored (``cross``) and taken out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import ClassVar, Self

import torch
from torch import Tensor

from ..errors import BundleError
from ..kernels.attend import RoundedDecoder
from .base import CODECS, Codec
from .checks import Stored

GROUP_LATENTS = 4
"""Latents whose decoders lie side by side, as 8-bit dot products take them."""

_TOP = 127
_ROWS_AT_ONCE = 256
_SMALLEST = 1e-30
_SMALLEST_EIGENVALUE = 0.003
_MEAN_SCALES = 30  # between an element of median cost and one whose errors cost nothing
_SHARES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@CODECS.register("linear8")
class Linear8Codec(Codec):
    """Latents are in units of their step: a code is a latent, shifted and rounded.

    Args:
        mean: ``[W]`` float32.
        decoder: int8 ``[S, G, D, 4]``: of ``S`` slots of ``D`` elements and of ``G`` groups of four latents, the last one
            padded with zeros; times ``decoder_scale``.
        decoder_scale: ``[W]`` float32, the step of each element's column.
        exact: float16 ``[E, W]``: decoder of the first latents, whose codes are too large for 8 bits. ``E + 4 G >= R``.
        metric: int8 ``[N]``, the metric of every side of ``w`` elements, one after the other, its lower triangle row by row; times
            ``metric_scale`` by rows and by columns.
        sides: int32, elements of every side.
        metric_scale: ``[W]`` float32.
        norm: ``[R]`` float32, length of each row of the decoder under the metric.
        cross: int8 ``[R - K, K]``: products of the rows of the other latents with those of the ``K`` strong ones, all of
            length 1, in units of ``cross_scale``.
        cross_scale: ``[K]`` float32.
        strong: float16 ``[K, K]``: what solves for the strong latents once the others' share is out.
        gain: ``[R]`` float32, what latents are multiplied by before they are rounded; None for 1.
    """

    name = "linear8"
    stored: ClassVar[Mapping[str, Stored]] = {
        "mean": Stored("W"),
        "decoder": Stored("SGDJ", torch.int8),
        "decoder_scale": Stored("W"),
        "exact": Stored("EW", torch.float16),
        "metric": Stored("N", torch.int8),
        "sides": Stored("P", torch.int32),
        "metric_scale": Stored("W"),
        "norm": Stored("R"),
        "cross": Stored("OK", torch.int8),
        "cross_scale": Stored("K"),
        "strong": Stored("KK", torch.float16),
        "gain": Stored("R", optional=True),
    }

    def __init__(
        self, mean: Tensor, decoder: Tensor, decoder_scale: Tensor, exact: Tensor, metric: Tensor,
        sides: Tensor, metric_scale: Tensor, norm: Tensor, cross: Tensor, cross_scale: Tensor, strong: Tensor, gain: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.mean, self.decoder, self.decoder_scale, self.exact = mean, decoder, decoder_scale, exact
        self.metric, self.sides, self.metric_scale = metric, sides, metric_scale
        self.norm, self.cross, self.cross_scale, self.strong, self.gain = norm, cross, cross_scale, strong, gain

    @property
    def latents(self) -> int:
        """Latents, ``R``."""
        return len(self.norm)

    def encode(self, x: Tensor) -> Tensor:
        """See ``Codec``; the latents of least cost."""
        shares = self._products(self._weighed(x - self.mean)) / self.norm
        count = len(self.strong)
        cross, others = self.cross * self.cross_scale, shares[..., count:]
        strong = (shares[..., :count] - others @ cross) @ self.strong.float()
        z = torch.cat([strong, others - strong @ cross.T], -1) / self.norm
        return z if self.gain is None else z * self.gain

    def decode(self, z: Tensor) -> Tensor:
        """See ``Codec``."""
        out = z[..., : len(self.exact)] @ self.exact.float() + self.mean
        for first, rows in self._rounded_rows():
            out += z[..., first : first + len(rows)] @ rows
        return out

    def affine_decoder(self) -> tuple[Tensor, Tensor]:
        """The decoder in float, made anew at every call."""
        return torch.cat([self.exact.float(), *(rows for _, rows in self._rounded_rows())]), self.mean

    def rounded_decoder(self) -> RoundedDecoder:
        """The decoder as it lies in memory."""
        return RoundedDecoder(self.exact, self.decoder, self.decoder_scale, self.mean)

    @property
    def knows_cost(self) -> bool:
        """See ``Codec``."""
        return True

    def error_cost(self, error: Tensor) -> Tensor:
        """See ``Codec``: ``error' M error / 2``, the divergence to second order."""
        return (error * self._weighed(error)).sum(-1) / 2

    def mean_scale(self) -> Tensor:
        """See ``Codec``: an error goes so far where it costs little."""
        least = self.metric_scale.median() / _MEAN_SCALES
        scale = 1 / self.metric_scale.clamp_min(least.clamp_min(_SMALLEST))
        return scale / scale.square().mean().sqrt()

    def tensors(self) -> dict[str, Tensor]:
        """See ``Codec``."""
        return {name: getattr(self, name) for name in self.stored if name != "gain" or self.gain is not None}

    @classmethod
    def rebuilt(cls, tensors: Mapping[str, Tensor]) -> Self:
        """See ``Codec``."""
        codec = cls(**tensors)
        slots, groups, dim, together = codec.decoder.shape
        rounded = codec.latents - len(codec.exact)
        if slots * dim != len(codec.mean) or together != GROUP_LATENTS or groups != -(-rounded // GROUP_LATENTS):
            raise BundleError(
                f"the codec's decoder has {groups} groups of {together} latents for {slots} slots of {dim} elements, but there are "
                f"{rounded} latents in 8 bits and {len(codec.mean)} elements; the bundle is damaged, fit it again"
            )
        sides = codec.sides.tolist()
        if min(sides, default=0) < 1 or sum(sides) != len(codec.mean) or sum(map(_entries, sides)) != len(codec.metric):
            raise BundleError(
                f"the codec's metric has {len(codec.metric)} entries for sides of {sides[:9]} elements, which do not add up to "
                f"{len(codec.mean)}; the bundle is damaged, fit it again"
            )
        if len(codec.cross) + len(codec.strong) != codec.latents or not (codec.norm > 0).all():
            raise BundleError("the codec's encoder does not fit its latents; the bundle is damaged, fit it again")
        return codec

    @classmethod
    @torch.no_grad()
    def rounded(
        cls, mean: Tensor, decoder: Tensor, metrics: Sequence[RoundedMetric], head_dim: int, exact: int, strong: int
    ) -> Self:
        """Round a decoder, and find what its encoder needs.

        Args:
            mean: float ``[W]``.
            decoder: float ``[R, W]``, of latents in units of their steps, those of the largest codes first.
            metrics: of the sides that the block's elements are of, in order.
            head_dim: elements of a slot.
            exact: first latents whose rows stay in float16.
            strong: first latents that are taken out of the others.
        """
        own = decoder[exact:].double()
        own = torch.nn.functional.pad(own, (0, 0, 0, -len(own) % GROUP_LATENTS))
        scale = (own.abs().amax(0) if len(own) else own.new_zeros(own.shape[1])).clamp_min(1e-20) / _TOP
        codes = (own / scale).round().clamp(-_TOP, _TOP).to(torch.int8)
        arranged = codes.unflatten(1, (-1, head_dim)).unflatten(0, (-1, GROUP_LATENTS)).permute(2, 0, 3, 1)
        codec = cls(
            mean.float(), arranged.contiguous(), scale.float(), decoder[:exact].to(torch.float16),
            torch.cat([metric.triangle() for metric in metrics]),
            torch.tensor([len(metric.codes) for metric in metrics], dtype=torch.int32), torch.cat([metric.scale for metric in metrics]).float(),
            torch.ones(len(decoder), dtype=torch.float32), torch.zeros(len(decoder) - strong, strong, dtype=torch.int8), torch.ones(strong, dtype=torch.float32), torch.eye(strong, dtype=torch.float16),
        )  # fmt: skip
        codec._solve(strong)
        return codec

    def _solve(self, strong: int) -> None:
        """Set the lengths of the decoder's rows, and what the strong ones share with all."""
        matrix = self.affine_decoder()[0]
        weighed = self._weighed(matrix)
        norm = (matrix * weighed).sum(1).clamp_min(_SMALLEST).sqrt()
        largest = weighed[:strong] / norm[:strong, None]
        products = (matrix @ largest.T) / norm[:, None]
        self.norm, others = norm, products[strong:]
        self.cross_scale = (others.abs().amax(0) if len(others) else norm.new_zeros(strong)).clamp_min(_SMALLEST) / _TOP
        self.cross = (others / self.cross_scale).round().clamp(-_TOP, _TOP).to(torch.int8)
        cross = (self.cross * self.cross_scale).double()
        shared = products[:strong].double() - cross.T @ cross
        # A direction that no vector has anything in (of rank-deficient keys or values) stands alone.
        shared.diagonal().add_((shared.diagonal() == 0).double())
        self.strong = torch.linalg.inv(shared).to(torch.float16)

    def _weighed(self, x: Tensor) -> Tensor:
        """Multiply vectors ``[..., W]`` by the metric."""
        sides = self.sides.tolist()
        parts, metrics = (x * self.metric_scale).split(sides, dim=-1), self.metric.split([_entries(w) for w in sides])
        # A side at a time, so that little of the metric exists in float.
        products = [part @ _square(own, w).to(part.dtype) for part, own, w in zip(parts, metrics, sides, strict=True)]
        return torch.cat(products, -1) * self.metric_scale

    def _products(self, x: Tensor) -> Tensor:
        """Multiply vectors ``[..., W]`` by all rows of the decoder, ``[..., R]``."""
        parts = [x @ self.exact.float().T, *(x @ rows.T for _, rows in self._rounded_rows())]
        return torch.cat(parts, -1)[..., : self.latents]

    def _rounded_rows(self) -> Iterator[tuple[int, Tensor]]:
        """Yield the rows in 8 bits as float32 ``[n, W]``, some at a time, with the latent that the first of them is of."""
        exact = len(self.exact)
        for first in range(0, self.decoder.shape[1], _ROWS_AT_ONCE // GROUP_LATENTS):
            part = self.decoder[:, first : first + _ROWS_AT_ONCE // GROUP_LATENTS]
            latent = exact + first * GROUP_LATENTS
            rows = part.permute(1, 3, 0, 2).flatten(2).flatten(0, 1)[: self.latents - latent]
            yield latent, rows * self.decoder_scale


class RoundedMetric:
    """A metric of one side in 8 bits.

    Attributes:
        codes: int8 ``[w, w]``, symmetric.
        scale: float64 ``[w]``; the metric is ``codes * scale * scale'``.
    """

    def __init__(self, metric: Tensor) -> None:
        diagonal = metric.double().diagonal().clamp_min(1e-300).sqrt()
        self.codes = _positive_codes(metric.double() / torch.outer(diagonal, diagonal))
        self.scale = diagonal / _TOP**0.5

    def triangle(self) -> Tensor:
        """The lower triangle of the codes, row by row."""
        rows, columns = torch.tril_indices(*self.codes.shape)
        return self.codes[rows, columns]

    def matrix(self) -> Tensor:
        """The metric, float64 ``[w, w]``."""
        return self.codes.double() * torch.outer(self.scale, self.scale)


def _positive_codes(unit: Tensor) -> Tensor:
    """Round a matrix of unit diagonal, moved towards the identity by as little as keeps it positive definite."""
    identity = torch.eye(len(unit), dtype=unit.dtype)
    codes = (identity * _TOP).to(torch.int8)
    for share in _SHARES:
        codes = (unit.lerp(identity, share) * _TOP).round().clamp(-_TOP, _TOP).to(torch.int8)
        if float(torch.linalg.eigvalsh(codes.double())[0]) > _SMALLEST_EIGENVALUE * _TOP:
            break
    return codes


def _entries(side: int) -> int:
    return side * (side + 1) // 2


def _square(triangle: Tensor, side: int) -> Tensor:
    """The symmetric matrix of a lower triangle."""
    return triangle[_places(side, triangle.device)]


@lru_cache(8)
def _places(side: int, device: torch.device) -> Tensor:
    """Where each element of a symmetric matrix lies in its lower triangle, int32 ``[side, side]``."""
    index = torch.arange(side, device=device)
    row, column = torch.maximum(index[:, None], index), torch.minimum(index[:, None], index)
    return (row * (row + 1) // 2 + column).to(torch.int32)
