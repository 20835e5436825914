"""Palu: keys and values of a group of heads through a low-rank projection, the latents optionally quantised.

Source: "Palu: Compressing KV-Cache with Low-Rank Projection", arXiv 2407.21118. As there: groups of up to 4 heads of a
layer, keys before RoPE, ranks in proportion to the Fisher information of the projections, latents quantised per token
(asymmetric, step and least element in 16 bits) after a rotation that spreads outliers. Palu decomposes the weights,
whitened by the inputs' second moment; the product of the two is the principal subspace of the outputs' (uncentred)
second moment, which is what is computed here. A random orthogonal matrix stands in for its Hadamard matrix, which
exists for few ranks only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvcar.fit.partition import regular_blocks
from kvcar.fit.statistics import Statistics
from kvcar.geometry import Kind, KVGeometry

from .base import Method
from .calibration import Block, Calibration
from .fisher import fisher_of_blocks, share_ranks
from .registry import BASELINES
from .stored import Codes, Stored, to_half
from .turboquant import random_rotation
from .uniform import dequantise, quantise

HEADS_PER_GROUP = 4
RAW_BITS = 16


class Palu(Method):
    """Low-rank groups of heads.

    Args:
        geometry: of the model.
        blocks: slots of each group, of one layer and kind.
        bases: orthonormal columns float32 ``[W, r]`` of each group.
        bits: of each latent, 16 for unquantised.
        config: for the record.
    """

    family = "Palu"
    keys_before_rope = True

    def __init__(
        self, geometry: KVGeometry, blocks: Sequence[Block], bases: Sequence[Tensor], bits: int, config: dict[str, Any]
    ) -> None:
        self.bits, self.config = bits, config
        self._geometry = geometry
        self.family = "Palu" if bits == RAW_BITS else f"Palu, {bits}-bit latents"
        layers = geometry.codable_layers
        self._groups: dict[Kind, list[tuple[int, list[int], Tensor]]] = {"key": [], "value": []}
        for index, (block, basis) in enumerate(zip(blocks, bases, strict=True)):
            spread = basis if bits == RAW_BITS else basis @ random_rotation(basis.shape[1], index)
            place = (layers.index(block[0].layer), [slot.head for slot in block], spread)
            self._groups[block[0].kind].append(place)

    def encode(self, kind: Kind, x: Tensor) -> Stored:
        """See ``Method``."""
        codes, halves = [], []
        for layer, heads, basis in self._groups[kind]:
            latents = x[layer, heads].transpose(0, 1).flatten(1) @ basis
            if self.bits == RAW_BITS:
                halves.append(to_half(latents))
                continue
            code, *scales = quantise(latents, self.bits, dim=1)
            codes.append(Codes(code, self.bits))
            halves += scales
        return Stored(tuple(codes), tuple(halves))

    def decode(self, kind: Kind, stored: Stored) -> Tensor:
        """See ``Method``."""
        g, tokens = self._geometry, len(stored.halves[0])
        out = stored.halves[0].new_empty(len(g.codable_layers), g.kv_heads, tokens, g.head_dim, dtype=torch.float32)
        steps, leasts = stored.halves[0::2], stored.halves[1::2]
        for index, (layer, heads, basis) in enumerate(self._groups[kind]):
            if self.bits == RAW_BITS:
                latents = stored.halves[index].float()
            else:
                latents = dequantise(stored.codes[index].values, steps[index], leasts[index])
            y = latents @ basis.T
            out[layer, heads] = y.unflatten(1, (len(heads), -1)).transpose(0, 1)
        return out


def fit(calibration: Calibration, kept: float, bits: int) -> Palu:
    """Palu with ``kept`` of all ranks, shared among groups by Fisher information."""
    heads = min(HEADS_PER_GROUP, calibration.geometry.kv_heads)
    blocks = tuple(regular_blocks(calibration.geometry, layers_per_block=1, heads_per_block=heads))
    full = [len(block) * calibration.geometry.head_dim for block in blocks]
    ranks = share_ranks(fisher_of_blocks(calibration, blocks), full, kept)
    bases = [_subspace(calibration.statistics, block, rank) for block, rank in zip(blocks, ranks, strict=True)]
    return Palu(
        calibration.geometry,
        blocks,
        bases,
        bits,
        {"kept_ranks": kept, "bits": bits, "heads_per_group": heads, "ranks": ranks},
    )


def _subspace(statistics: Statistics, block: Block, rank: int) -> Tensor:
    """Principal directions of the uncentred second moment, float32 ``[W, rank]``."""
    mean = statistics.mean(block)
    second = statistics.covariance(block) + torch.outer(mean, mean)
    return torch.linalg.eigh(second).eigenvectors.flip(1)[:, :rank].float().contiguous()


def _register(removed_percent: int, bits: int) -> None:
    name = f"palu-{removed_percent}" + ("" if bits == RAW_BITS else f"-{bits}bit")
    BASELINES.register(name)(lambda calibration: fit(calibration, 1 - removed_percent / 100, bits))


for _removed in (30, 50):
    for _bits in (RAW_BITS, 4, 3):
        _register(_removed, _bits)
