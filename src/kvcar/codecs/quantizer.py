"""Quantisers of a block's latents: what pages store for each token, and the latents that this stands for.

The static one has a step per latent, ``z ~ scale * u + zero``: it costs no bytes per token and folds into an affine
decoder. The dynamic one (the paper's) has a step per token, stored with it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import BundleError
from ..kernels.trellis import Branches, nearest_levels
from ..plan import DYNAMIC_SCALE_LATENTS, MOST_TRELLIS_BITS, RAW_BITS, BitGroup, Block
from .checks import Stored, checked

FLOAT16_MAX = 65504.0
# The smallest normal float16, so that a step keeps its precision.
_SMALLEST_STEP, _LARGEST_STEP = 2.0**-14, FLOAT16_MAX
# Of a static step: what it divides must not overflow.
_SMALLEST_SCALE = 2.0**-96


def latent_bits(groups: Sequence[BitGroup]) -> Tensor:
    """Bits of each latent, int64 ``[R]``."""
    return torch.tensor([group.bits for group in groups for _ in range(group.count)], dtype=torch.int64)


class Quantizer(ABC):
    """Rounds latents ``[..., R]`` to stored values ``[..., S]``, ``S`` of the block's segment, and back."""

    @abstractmethod
    def codes(self, z: Tensor, before: Tensor | None = None) -> Tensor:
        """Stored values float32 of latents: whole numbers where they are packed, rounded to float16 where not.

        Args:
            z: latents ``[..., R]``, of tokens that follow each other along the axis before the last.
            before: stored values ``[..., n, S]`` of the tokens before them in the page that they begin in; None where they
                begin one.
        """

    @abstractmethod
    def latents(self, u: Tensor) -> Tensor:
        """Latents that stored values stand for."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What a bundle stores."""

    def folded(self, matrix: Tensor, bias: Tensor) -> tuple[Tensor, Tensor] | None:
        """``latents`` followed by ``z @ matrix + bias`` as one affine map of stored values; None if it is not affine."""
        del matrix, bias
        return None

    def steps(self) -> tuple[Tensor, Tensor] | None:
        """Scale and zero ``[R]`` when codes are ``(z - zero) / scale``, rounded and clamped to each latent's bits."""
        return None


class StaticQuantizer(Quantizer):
    """A step for each latent.

    ``u`` is an integer of 0 to ``2**bits - 1`` for packed latents and ``z`` itself, rounded to float16, for raw ones
    (scale 1, zero 0).

    Args:
        groups: the block's groups of latents.
        scale: step of each latent, float32 ``[R]``, above 0.
        zero: latent that code 0 stands for, float32 ``[R]``.
    """

    stored: ClassVar[Mapping[str, Stored]] = {"scale": Stored("R"), "zero": Stored("R")}

    def __init__(self, groups: Sequence[BitGroup], scale: Tensor, zero: Tensor) -> None:
        self.groups = tuple(groups)
        self.scale, self.zero = scale, zero
        bits = latent_bits(groups).to(scale.device)
        self._raw = bits == RAW_BITS
        # In float32 whatever PyTorch's default is: numbers of Python's and powers of integers would take that.
        levels = 2.0 ** bits.float() - 1
        self._lowest = torch.where(self._raw, levels.new_tensor(-FLOAT16_MAX), levels.new_tensor(0.0))
        self._highest = torch.where(self._raw, levels.new_tensor(FLOAT16_MAX), levels)

    def codes(self, z: Tensor, before: Tensor | None = None) -> Tensor:
        """See ``Quantizer``."""
        del before
        u = (z - self.zero) / self.scale
        rounded = torch.where(self._raw, u.to(torch.float16).float(), u.round()) if self._raw.any() else u.round()
        return rounded.clamp(self._lowest, self._highest)

    def latents(self, u: Tensor) -> Tensor:
        """See ``Quantizer``."""
        return u * self.scale + self.zero

    def folded(self, matrix: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """See ``Quantizer``."""
        return self.scale[:, None] * matrix, self.zero @ matrix + bias

    def steps(self) -> tuple[Tensor, Tensor]:
        """See ``Quantizer``."""
        return self.scale, self.zero

    def tensors(self) -> dict[str, Tensor]:
        """See ``Quantizer``."""
        return {"scale": self.scale, "zero": self.zero}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], groups: Sequence[BitGroup]) -> StaticQuantizer:
        """Rebuild and check.

        Raises:
            BundleError: a tensor is missing, misshapen or not finite, or a scale is not positive.
        """
        found = checked(tensors, cls.stored, R=sum(group.count for group in groups))
        scale, zero = found["scale"], found["zero"]
        if not (scale >= _SMALLEST_SCALE).all():
            raise BundleError("a quantiser's scale is not positive; the bundle is damaged, fit it again")
        raw = latent_bits(groups) == RAW_BITS
        if not ((scale[raw] == 1).all() and (zero[raw] == 0).all()):
            raise BundleError("a raw latent must have scale 1 and zero 0; the bundle is damaged, fit it again")
        return cls(groups, scale, zero)


class TrellisQuantizer(StaticQuantizer):
    """A step for each latent, and half steps that a trellis allows; see ``kernels.trellis``.

    Codes are levels, ``scale`` apart; of latents of 1 to ``MOST_TRELLIS_BITS`` bits, which have twice as many, a trellis allows
    every other one.

    Args:
        groups, scale, zero: see ``StaticQuantizer``.
        page_tokens: tokens that a trellis runs over.
    """

    def __init__(self, groups: Sequence[BitGroup], scale: Tensor, zero: Tensor, page_tokens: int) -> None:
        super().__init__(groups, scale, zero)
        self._page_tokens = page_tokens
        self._first = sum(group.count for group in groups if group.bits > MOST_TRELLIS_BITS)
        self._highest = torch.cat([self._highest[: self._first], 2 * self._highest[self._first :] + 1])

    def codes(self, z: Tensor, before: Tensor | None = None) -> Tensor:
        """See ``Quantizer``."""
        u = super().codes(z)
        if self._first == z.shape[-1]:
            return u
        targets = ((z - self.zero) / self.scale)[..., self._first :]
        u[..., self._first :] = self._levels(targets, None if before is None else before[..., self._first :])
        return u

    def _levels(self, targets: Tensor, before: Tensor | None) -> Tensor:
        """Levels ``[..., N, n]`` nearest to ``targets``, a page after the other."""
        targets = targets.float()
        count, highest = targets.shape[-2], self._highest[self._first :]
        flat = targets.reshape(-1, *targets.shape[-2:])
        begun = 0 if before is None else before.shape[-2] % self._page_tokens
        head = min(-begun % self._page_tokens, count) if begun else 0
        parts = []
        if head and before is not None:
            begin = Branches.after(before[..., -begun:, :].reshape(-1, begun, before.shape[-1]))
            parts.append(nearest_levels(flat[:, :head], highest, begin))
        whole = (count - head) // self._page_tokens * self._page_tokens
        if whole:
            pages = flat[:, head : head + whole].unflatten(1, (-1, self._page_tokens))
            parts.append(nearest_levels(pages.flatten(0, 1), highest).view(*flat[:, :whole].shape))
        if head + whole < count or not parts:
            parts.append(nearest_levels(flat[:, head + whole :], highest))
        return torch.cat(parts, dim=1).view(targets.shape)


class DynamicQuantizer(Quantizer):
    """A step and a zero point for each token, over all its latents.

    Source: KV-CAR (arXiv 2512.06727), part 3: ``scale = 255 / (max - min)``, ``zp = -round(scale * min) - 128``,
    ``q = round(scale * x + zp)``, ``x ~ (q - zp) / scale``. Stored are ``1 / scale`` and ``zp + 128`` as float16, then
    ``q + 128``. The range is widened to hold 0, so that the zero point is a code and exact in float16.

    Args:
        bits: of each latent; 8 in the paper.
    """

    def __init__(self, bits: int) -> None:
        self._levels = 2**bits - 1

    def codes(self, z: Tensor, before: Tensor | None = None) -> Tensor:
        """See ``Quantizer``."""
        del before
        low = z.amin(-1, keepdim=True).clamp_max(0)
        high = z.amax(-1, keepdim=True).clamp_min(0)
        step = ((high - low) / self._levels).clamp(_SMALLEST_STEP, _LARGEST_STEP).to(torch.float16).float()
        zero_point = (-low / step).round().clamp(0, self._levels)
        q = (z / step + zero_point).round().clamp(0, self._levels)
        return torch.cat([step, zero_point, q], dim=-1)

    def latents(self, u: Tensor) -> Tensor:
        """See ``Quantizer``."""
        return (u[..., DYNAMIC_SCALE_LATENTS:] - u[..., 1:2]) * u[..., :1]

    def tensors(self) -> dict[str, Tensor]:
        """Nothing: all is computed from the token."""
        return {}


def read_quantizer(tensors: Mapping[str, Tensor], block: Block, page_tokens: int) -> Quantizer:
    """The quantiser of a block from a bundle's tensors; raises BundleError as ``from_tensors`` does."""
    if block.scales == "dynamic":
        checked(tensors, {})
        return DynamicQuantizer(block.groups[0].bits)
    found = StaticQuantizer.from_tensors(tensors, block.groups)
    return TrellisQuantizer(block.groups, found.scale, found.zero, page_tokens) if block.trellis else found
