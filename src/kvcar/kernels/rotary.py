"""Rotary position embedding from inverse frequencies, so that coded keys can be rotated after decoding.

A model hands the cache keys that are already rotated. Rotating back and forth needs the angles of any position, which
are ``position * inverse_frequency`` for every rotary embedding whose frequencies do not depend on the length.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..sizes import FINE_POSITIONS, rotary_table_entries

RotaryStyle = Literal["half", "interleaved"]


class RotaryTable:
    """Angles of one kind of layer.

    Args:
        inverse_frequency: float64 ``[F]`` radians per position; ``2 F`` of a head's elements rotate.
        attention_scale: factor that the model multiplies cos and sin by (YaRN); 1 elsewhere.
        style: "half" pairs element i with i + F, "interleaved" pairs 2 i with 2 i + 1.
    """

    def __init__(self, inverse_frequency: Tensor, attention_scale: float, style: RotaryStyle) -> None:
        self.inverse_frequency = inverse_frequency
        self.attention_scale = attention_scale
        self.style = style
        self._fine = self._exact(torch.arange(FINE_POSITIONS, device=inverse_frequency.device))
        self._coarse = self._exact(torch.zeros(1, device=inverse_frequency.device))

    @property
    def width(self) -> int:
        """Elements of a head that rotate."""
        return 2 * len(self.inverse_frequency)

    def cos_sin(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Compute cosines and sines, float32 ``[..., F]``, unscaled, of integer ``positions`` ``[...]``.

        By angle addition from two small tables; negative positions (padding) count as 0.
        """
        positions = positions.clamp_min(0)
        self._cover(positions)
        coarse, fine = positions // FINE_POSITIONS, positions % FINE_POSITIONS
        cos_a, sin_a = (table[coarse] for table in self._coarse)
        cos_b, sin_b = (table[fine] for table in self._fine)
        return cos_a * cos_b - sin_a * sin_b, sin_a * cos_b + cos_a * sin_b

    def tables(self, positions: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Return (cos, sin) ``[FINE_POSITIONS, F]`` of single steps and (cos, sin) ``[n, F]``, float32, of multiples of
        ``FINE_POSITIONS``, which together reach all positions below ``positions``; not scaled.
        """
        if positions > FINE_POSITIONS * len(self._coarse[0]):
            self._cover(torch.tensor([positions - 1], device=self.inverse_frequency.device))
        return self._fine, self._coarse

    @property
    def table_bytes(self) -> int:
        """Bytes of the tables; they depend on the longest sequence seen, not on the batch or the layers."""
        return sum(part.nbytes for table in (self._fine, self._coarse) for part in table)

    def _cover(self, positions: Tensor) -> None:
        have = len(self._coarse[0])
        need = rotary_table_entries(int(positions.max()) + 1) if positions.numel() else 0
        if need > have:
            self._coarse = self._exact(torch.arange(need, device=positions.device) * FINE_POSITIONS)

    def _exact(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions[..., None].double() * self.inverse_frequency
        return angles.cos().float(), angles.sin().float()

    def rotate(self, keys: Tensor, positions: Tensor) -> Tensor:
        """Rotate keys before RoPE to float32 ``[B, H, N, D]``; ``positions`` is int64 ``[B, N]``."""
        cos, sin = (part[:, None] for part in self.cos_sin(positions))
        return self._turn(keys.float(), cos * self.attention_scale, sin * self.attention_scale)

    def unrotate(self, keys: Tensor, positions: Tensor) -> Tensor:
        """Undo ``rotate``: keys before RoPE, float32 ``[B, H, N, D]``."""
        cos, sin = (part[:, None] for part in self.cos_sin(positions))
        return self._turn(keys.float(), cos / self.attention_scale, -sin / self.attention_scale)

    def _turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        half, width = self.width // 2, self.width
        out = x.clone()
        if self.style == "half":
            first, second = x[..., :half], x[..., half:width]
            out[..., :half] = first * cos - second * sin
            out[..., half:width] = second * cos + first * sin
        else:
            first, second = x[..., 0:width:2], x[..., 1:width:2]
            out[..., 0:width:2] = first * cos - second * sin
            out[..., 1:width:2] = second * cos + first * sin
        return out
