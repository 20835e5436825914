"""Everything about a model that choosing a plan needs: moments of keys and values, and what errors in them cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .capture import capture
from .effect import EffectProbe, damped, effect_metrics
from .side_moments import SideMoments
from .solve import Basis, principal_basis
from .processes import own_share
from ..progress import OnProgress, counter
from ..geometry import KINDS, KVGeometry, Side, Slot

_SAMPLE_TOKENS = 2048

Slots = tuple[Slot, ...]


@dataclass(frozen=True)
class Statistics:
    """Of one model on one text.

    Attributes:
        geometry: the model's cache.
        moments: of keys (before RoPE) and values.
        metrics: (layer, kind) -> what errors cost, positive definite float64 ``[H * D, H * D]``, nats.
    """

    geometry: KVGeometry
    moments: SideMoments
    metrics: dict[Side, Tensor]
    _bases: dict[Slots, Basis] = field(default_factory=dict)

    def basis(self, slots: Slots) -> Basis:
        """Basis of a block whose slots follow each other side by side; kept, as it takes long for wide blocks."""
        if slots not in self._bases:
            sides = _sides_of(slots)
            columns = self._columns(slots, sides)
            mean = self.moments.mean(sides)[columns]
            covariance = self.moments.covariance(sides)[columns][:, columns]
            self._bases[slots] = principal_basis(mean, covariance, self._metrics_of(slots, sides))
        return self._bases[slots]

    def variances(self, slots: Slots) -> Tensor:
        """Variances of such a block's basis, falling, without the basis itself."""
        sides = _sides_of(slots)
        columns = self._columns(slots, sides)
        root = torch.block_diag(*(torch.linalg.cholesky(m) for m in self._metrics_of(slots, sides)))
        covariance = self.moments.covariance(sides)[columns][:, columns]
        # The spectrum of L' C L is that of the symmetric root's product.
        return torch.linalg.eigvalsh(root.T @ covariance @ root).flip(0).clamp_min(0)

    def sample(self, slots: Slots) -> Tensor:
        """Sampled vectors float32 ``[S, W]`` of a block."""
        sides = _sides_of(slots)
        return self.moments.sample(sides)[:, self._columns(slots, sides)]

    def _columns(self, slots: Slots, sides: Sequence[Side]) -> Tensor:
        dim, heads = self.geometry.head_dim, self.geometry.kv_heads
        starts = [(sides.index((s.layer, s.kind)) * heads + s.head) * dim for s in slots]
        return torch.cat([torch.arange(start, start + dim) for start in starts])

    def _metrics_of(self, slots: Slots, sides: Sequence[Side]) -> list[Tensor]:
        dim = self.geometry.head_dim
        found = []
        for side in sides:
            heads = [s.head for s in slots if (s.layer, s.kind) == side]
            own = torch.cat([torch.arange(head * dim, (head + 1) * dim) for head in heads])
            found.append(self.metrics[side][own][:, own])
        return found


def _sides_of(slots: Slots) -> list[Side]:
    """Sides in the order in which a block's slots name them."""
    return list(dict.fromkeys((slot.layer, slot.kind) for slot in slots))


def collect_statistics(
    model: PreTrainedModel,
    geometry: KVGeometry,
    windows: Tensor,
    effect_windows: Tensor,
    bands: tuple[int, int],
    sinks: int,
    step_tokens: int,
    window: int,
    seed: int,
    on_progress: OnProgress,
) -> Statistics:
    """One pass forwards over ``windows`` for moments, one forwards and backwards over ``effect_windows`` for metrics.

    Args:
        model: a causal language model using sdpa attention; only run, never changed.
        geometry: its cache.
        windows, effect_windows: token ids int64 ``[N, T]``.
        bands: layers of the longest block of one kind that will be asked for, and of one that keys and values share.
        sinks: first tokens, left out.
        step_tokens, window: which recent tokens are read exactly; see ``EffectProbe``.
        seed: of the tokens drawn for the metrics.
        on_progress: told what is going on.

    Under ``accelerate launch`` each process runs its share of the windows, and all end with the statistics of all windows.
    """
    layers, width = geometry.codable_layers, geometry.kv_heads * geometry.head_dim
    stride = max(1, windows.shape[0] * (windows.shape[1] - sinks) // _SAMPLE_TOKENS)
    windows = own_share(windows)
    sides: list[Side] = [(layer, kind) for layer in layers for kind in KINDS]
    moments = SideMoments(sides, width, *bands, stride)
    blocks = [tuple(Slot(layer, head, kind) for head in range(geometry.kv_heads)) for layer, kind in sides]
    count = counter(on_progress, "capture keys and values", windows.shape[0] * (windows.shape[1] - sinks))
    count(0)
    for tokens in capture(model, geometry, windows, blocks, sinks, lambda i, x: moments.add(sides[i], x)):
        count(tokens)
    moments.reduce()
    probe = EffectProbe(model, geometry, sinks, step_tokens, window, seed)
    metrics = effect_metrics(probe, effect_windows, on_progress)
    for side in sides:
        metrics[side] = damped(metrics[side], moments.covariance([side]))
    return Statistics(geometry, moments, metrics)
