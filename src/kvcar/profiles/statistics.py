"""Everything about a model that choosing a plan needs: moments of keys and values, and what errors in them cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..fit.capture import capture
from ..fit.effect import EffectProbe, damped, effect_metrics
from ..fit.layer_moments import LayerMoments
from ..fit.solve import Basis, principal_basis
from ..processes import own_share
from ..progress import OnProgress, counter
from ..shapes import KINDS, Kind, KVGeometry, Slot

_SAMPLE_TOKENS = 2048

Slots = tuple[Slot, ...]


@dataclass(frozen=True)
class Statistics:
    """Of one model on one text.

    Attributes:
        geometry: the model's cache.
        moments: of keys (before RoPE) and of values.
        metrics: (layer, kind) -> what errors cost, positive definite float64 ``[H * D, H * D]``, nats.
    """

    geometry: KVGeometry
    moments: dict[Kind, LayerMoments]
    metrics: dict[tuple[int, Kind], Tensor]
    _bases: dict[Slots, Basis] = field(default_factory=dict)

    def basis(self, slots: Slots) -> Basis:
        """Basis of a block of slots of one kind, layer by layer; kept, as it takes long for wide blocks."""
        if slots not in self._bases:
            layers, kind = _layers_of(slots), slots[0].kind
            columns = self._columns(slots, layers)
            mean = self.moments[kind].mean(layers)[columns]
            covariance = self.moments[kind].covariance(layers)[columns][:, columns]
            self._bases[slots] = principal_basis(mean, covariance, self._metrics_of(slots, layers))
        return self._bases[slots]

    def variances(self, slots: Slots) -> Tensor:
        """Variances of such a block's basis, falling, without the basis itself."""
        layers, kind = _layers_of(slots), slots[0].kind
        columns = self._columns(slots, layers)
        root = torch.block_diag(*(torch.linalg.cholesky(m) for m in self._metrics_of(slots, layers)))
        covariance = self.moments[kind].covariance(layers)[columns][:, columns]
        # The spectrum of L' C L is that of the symmetric root's product.
        return torch.linalg.eigvalsh(root.T @ covariance @ root).flip(0).clamp_min(0)

    def sample(self, slots: Slots) -> Tensor:
        """Sampled vectors float32 ``[S, W]`` of a block."""
        layers = _layers_of(slots)
        return self.moments[slots[0].kind].sample(layers)[:, self._columns(slots, layers)]

    def _columns(self, slots: Slots, layers: Sequence[int]) -> Tensor:
        dim, heads = self.geometry.head_dim, self.geometry.kv_heads
        starts = [(layers.index(s.layer) * heads + s.head) * dim for s in slots]
        return torch.cat([torch.arange(start, start + dim) for start in starts])

    def _metrics_of(self, slots: Slots, layers: Sequence[int]) -> list[Tensor]:
        dim, kind = self.geometry.head_dim, slots[0].kind
        found = []
        for layer in layers:
            own = torch.cat([torch.arange(s.head * dim, (s.head + 1) * dim) for s in slots if s.layer == layer])
            found.append(self.metrics[layer, kind][own][:, own])
        return found


def _layers_of(slots: Slots) -> list[int]:
    return sorted({slot.layer for slot in slots})


def collect_statistics(
    model: PreTrainedModel,
    geometry: KVGeometry,
    windows: Tensor,
    effect_windows: Tensor,
    band: int,
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
        band: layers of the longest block that will be asked for.
        sinks: first tokens, left out.
        step_tokens, window: which recent tokens are read exactly; see ``EffectProbe``.
        seed: of the tokens drawn for the metrics.
        on_progress: told what is going on.

    Under ``accelerate launch`` each process runs its share of the windows, and all end with the statistics of all windows.
    """
    layers, width = geometry.codable_layers, geometry.kv_heads * geometry.head_dim
    stride = max(1, windows.shape[0] * (windows.shape[1] - sinks) // _SAMPLE_TOKENS)
    windows = own_share(windows)
    moments: dict[Kind, LayerMoments] = {kind: LayerMoments(layers, width, band, stride) for kind in KINDS}
    sides: list[tuple[int, Kind]] = [(layer, kind) for layer in layers for kind in KINDS]
    blocks = [tuple(Slot(layer, head, kind) for head in range(geometry.kv_heads)) for layer, kind in sides]
    count = counter(on_progress, "capture keys and values", windows.shape[0] * (windows.shape[1] - sinks))
    count(0)
    for tokens in capture(
        model, geometry, windows, blocks, sinks, lambda i, x: moments[sides[i][1]].add(sides[i][0], x)
    ):
        count(tokens)
    for each in moments.values():
        each.reduce()
    probe = EffectProbe(model, geometry, sinks, step_tokens, window, seed)
    metrics = effect_metrics(probe, effect_windows, on_progress)
    for layer, kind in sides:
        metrics[layer, kind] = damped(metrics[layer, kind], moments[kind].covariance([layer]))
    return Statistics(geometry, moments, metrics)
