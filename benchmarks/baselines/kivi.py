"""KIVI: keys quantised per channel, values per token, in small groups, with a recent part that stays exact.

Source: "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache", arXiv 2402.02750. As there: groups of 32, a
residual of 128 tokens, keys after RoPE, step and least element of each group in 16 bits. Keys leave the residual 128
at a time, so that right after that none is exact; values leave one by one. It keeps no sinks; the rows called ``sinks``
give it kvcar's sinks and window instead.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kvcar.geometry import Kind

from .base import AS_KVCAR, Method, Places
from .registry import BASELINES
from .stored import Codes, Stored
from .uniform import dequantise, quantise

GROUP = 32
RESIDUAL_TOKENS = 128
AS_PAPER: Mapping[Kind, Places] = {
    "key": Places(sinks=0, window=0, block=RESIDUAL_TOKENS),
    "value": Places(sinks=0, window=RESIDUAL_TOKENS, block=1),
}


class Kivi(Method):
    """KIVI at ``bits`` per code.

    Args:
        bits: of each code, 1 to 8.
        places: the paper's, or kvcar's.
    """

    def __init__(self, bits: int, places: Mapping[Kind, Places] = AS_PAPER) -> None:
        self.bits, self.places = bits, places
        own = places is AS_PAPER
        self.family = "KIVI" if own else "KIVI, kvcar's sinks and window"
        self.config = {"bits": bits, "group": GROUP, "residual_tokens": RESIDUAL_TOKENS if own else None}

    def encode(self, kind: Kind, x: Tensor) -> Stored:
        """See ``Method``; a group that sinks cut short still has a step and a least element of its own."""
        dim = 2 if kind == "key" else 3
        # Groups end at whole blocks, so what is left over (sinks taken out) is in the first one.
        whole, first = divmod(x.shape[dim], GROUP)
        parts = x.split([first] * (first > 0) + [GROUP] * whole, dim)
        quantised = [quantise(part, self.bits, dim) for part in parts]
        return Stored(
            codes=tuple(Codes(codes, self.bits) for codes, _, _ in quantised),
            halves=tuple(half for _, step, least in quantised for half in (step, least)),
        )

    def decode(self, kind: Kind, stored: Stored) -> Tensor:
        """See ``Method``."""
        steps, leasts = stored.halves[0::2], stored.halves[1::2]
        parts = [dequantise(c.values, s, m) for c, s, m in zip(stored.codes, steps, leasts, strict=True)]
        return torch.cat(parts, dim=2 if kind == "key" else 3)


def _register(bits: int) -> None:
    BASELINES.register(f"kivi-{bits}bit")(lambda _: Kivi(bits))
    BASELINES.register(f"kivi-sinks-{bits}bit")(lambda _: Kivi(bits, AS_KVCAR))


for _bits in (4, 3, 2):
    _register(_bits)
