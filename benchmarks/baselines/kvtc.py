"""KVTC: transform coding of the cache of all layers and heads together, as an image codec would do it.

Source: "KV Cache Transform Coding for Compact Storage in LLM Inference", arXiv 2511.01815. As there: keys before RoPE and
values apart, each centred and projected on the principal components of all layers and heads side by side; components in
groups of 16 to 1,024, each group of a token quantised with a step and a least element in 16 bits; bits chosen by dynamic
programming; DEFLATE over the packed codes at the end. Its sizes are named by what is asked for before entropy coding. Where
this differs: 8-bit codes are whole numbers, not FP8; groups start at multiples of their size; a Lagrange multiplier
replaces the table over budgets; and kvcar's window stays exact where the paper keeps 128 tokens, which favours it here.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kvcar.geometry import KINDS, Kind, KVGeometry, Slot

from .base import Method
from .calibration import Calibration
from .groups import Group, allocate_groups
from .registry import BASELINES
from .stored import Codes, Stored
from .uniform import dequantise, quantise

FULL_BITS = 16


@dataclass(frozen=True)
class Transform:
    """What keys or values go through.

    Attributes:
        mean: float32 ``[W]``, ``W`` of all layers and heads.
        basis: orthonormal columns float32 ``[W, R]``: the components that are given any bits.
        groups: of the basis' columns, in order.
    """

    mean: Tensor
    basis: Tensor
    groups: tuple[Group, ...]


class Kvtc(Method):
    """KVTC with fitted transforms.

    Args:
        geometry: of the model.
        transforms: for keys and for values.
        times: how many times smaller its codes are to be, before entropy coding.
    """

    family = "KVTC"
    keys_before_rope = True

    def __init__(self, geometry: KVGeometry, transforms: Mapping[Kind, Transform], times: float) -> None:
        self._shape = (len(geometry.codable_layers), geometry.kv_heads, geometry.head_dim)
        self._transforms = transforms
        kept = {kind: [t.basis.shape[1], len(t.groups)] for kind, t in transforms.items()}
        self.config = {"times_smaller_before_entropy_coding": times, "components_and_groups": kept}

    def encode(self, kind: Kind, x: Tensor) -> Stored:
        """See ``Method``."""
        t = self._transforms[kind]
        z = (x.permute(2, 0, 1, 3).flatten(1) - t.mean) @ t.basis
        codes, halves = [], []
        for part, group in zip(z.split([g.size for g in t.groups], dim=1), t.groups, strict=True):
            code, *scales = quantise(part, group.bits, dim=1)
            codes.append(Codes(code, group.bits))
            halves += scales
        return Stored(tuple(codes), tuple(halves))

    def decode(self, kind: Kind, stored: Stored) -> Tensor:
        """See ``Method``."""
        t = self._transforms[kind]
        steps, leasts = stored.halves[0::2], stored.halves[1::2]
        z = [dequantise(c.values, s, m) for c, s, m in zip(stored.codes, steps, leasts, strict=True)]
        x = torch.cat(z, dim=1) @ t.basis.T + t.mean
        return x.unflatten(1, self._shape).permute(1, 2, 0, 3)

    def stored_bits(self, stored: Stored) -> int:
        """Bits after DEFLATE, which falls back to the packed bytes themselves where it gains nothing."""
        return 8 * len(zlib.compress(stored.packed(), level=9))


def fit(calibration: Calibration, times: float) -> Kvtc:
    """KVTC whose codes are ``times`` smaller than bfloat16 before entropy coding."""
    return Kvtc(calibration.geometry, {kind: _transform(calibration, kind, times) for kind in KINDS}, times)


def _block(calibration: Calibration, kind: Kind) -> tuple[Slot, ...]:
    return tuple(calibration.geometry.slots(kind))


def _transform(calibration: Calibration, kind: Kind, times: float) -> Transform:
    principal = calibration.principal(_block(calibration, kind))
    width = len(principal.mean)
    groups = allocate_groups(principal.sample, int(FULL_BITS / times * width))
    columns = torch.cat([torch.arange(g.start, g.start + g.size) for g in groups])
    return Transform(principal.mean, principal.directions[:, columns].contiguous(), groups)


def _register(times: int) -> None:
    BASELINES.register(f"kvtc-{times}x")(lambda calibration: fit(calibration, times))


for _times in (8, 16, 32):
    _register(_times)
