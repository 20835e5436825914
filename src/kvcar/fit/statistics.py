"""Everything about a model that a fit needs: moments of keys and values, and what errors in them cost."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..codecs import RoundedMetric
from ..geometry import KINDS, KVGeometry, Side, Slot
from ..plan import CacheConfig
from ..progress import OnProgress, counter, silent
from .basis import Basis, blocks_times, principal_basis, times_blocks
from .capture import capture
from .effect import EffectProbe, damped, effect_metrics
from .options import Metric
from .processes import from_first, joined_rows, own_share, total

log = logging.getLogger("kvcar.fit")

SAMPLE_TOKENS = 2048
METRIC_ELEMENTS = 512
"""Elements of a side beyond which its metric is of groups of heads, as it is stored with every bundle."""

Slots = tuple[Slot, ...]


class SideMoments:
    """Means, covariances of sides near each other, and a thin sample, accumulated as vectors stream by.

    Products are taken in float32, a window at a time, about the first window's mean, and summed in float64. Memory is
    ``W**2 * 8`` bytes for every pair of sides near enough to share a block, ``W`` being the elements of a side.

    Args:
        sides: (layer, kind), in the order in which the vectors of a window arrive: layers ascending.
        width: ``W``.
        band: layers of the longest block of one kind that may be asked for, at least 1.
        shared_band: layers of the longest block that keys and values share; 0 for none.
        stride: distance between sampled tokens.
        groups: layers that may share blocks, in the order in which they are cut into these; None for all of them.
    """

    def __init__(
        self,
        sides: Sequence[Side],
        width: int,
        band: int,
        shared_band: int,
        stride: int,
        groups: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self.sides, self.width = tuple(sides), width
        self._place = {side: i for i, side in enumerate(self.sides)}
        groups = [sorted({layer for layer, _ in self.sides})] if groups is None else groups
        self._depth = _depths(groups)
        self._band, self._shared_band = band, shared_band
        self._stride = stride
        self.count = 0
        self._shift: dict[int, Tensor] = {}
        self._sums = torch.zeros(len(self.sides), width, dtype=torch.float64)
        self._outer: dict[tuple[int, int], Tensor] = {}
        self._recent: dict[int, Tensor] = {}
        self._samples: list[list[Tensor]] = [[] for _ in self.sides]
        self._moved: dict[int, Tensor] = {}

    def add(self, side: Side, x: Tensor) -> None:
        """Take in one side's vectors ``[N, W]`` of a window."""
        place = self._place[side]
        if place not in self._shift:
            self._shift[place] = x.mean(0)
        centred = x - self._shift[place]
        self._sums[place] += centred.sum(0).double().cpu()
        self._recent = {p: v for p, v in self._recent.items() if not self._is_past(p, place)} | {place: centred}
        wanted = [p for p in self._recent if self._may_share(p, place)]
        # One product for all of them: many narrow ones take several times as long.
        products = (torch.cat([self._recent[p] for p in wanted], dim=1).T @ centred).double().cpu()
        for other, product in zip(wanted, products.split(self.width), strict=True):
            key = (other, place)
            self._outer[key] = self._outer[key].add_(product) if key in self._outer else product.clone()
        self._samples[place].append(x[(-self.count) % self._stride :: self._stride].float().cpu().clone())
        if place == len(self.sides) - 1:
            self.count += len(x)
            self._recent = {}

    def reduce(self) -> None:
        """Take in what the other processes saw; all then hold the same."""
        count, sums = self.count, self._sums.clone()
        for place in range(len(self.sides)):
            shift = self._shift[place].double().cpu()
            common = from_first(shift)
            # Sums about another point: exact in what is known about this one.
            self._shift[place], self._moved[place] = common, shift - common
            self._sums[place] = total(sums[place] + count * self._moved[place])
        for (p, q), outer in self._outer.items():
            a, b = self._moved[p], self._moved[q]
            outer += torch.outer(sums[p], b) + torch.outer(a, sums[q]) + count * torch.outer(a, b)
            self._outer[p, q] = total(outer)
        self.count = int(total(torch.tensor(count)))
        self._samples = [[joined_rows(torch.cat(parts))] for parts in self._samples]
        self._moved = {}

    def mean(self, sides: Sequence[Side]) -> Tensor:
        """Mean float64 ``[len(sides) * W]``."""
        places = [self._place[side] for side in sides]
        return torch.cat([self._shift[p].double().cpu() + self._sums[p] / self.count for p in places])

    def covariance(self, sides: Sequence[Side]) -> Tensor:
        """Covariance float64 ``[n * W, n * W]`` of ``n`` sides, near enough to share a block."""
        places, w = [self._place[side] for side in sides], self.width
        result = torch.empty(len(places) * w, len(places) * w, dtype=torch.float64)
        for i, p in enumerate(places):
            for j, q in enumerate(places[i:], i):
                outer = self._outer[p, q] if p <= q else self._outer[q, p].T
                own = outer / self.count - torch.outer(self._sums[p], self._sums[q]) / self.count**2
                result[i * w : (i + 1) * w, j * w : (j + 1) * w] = own
                result[j * w : (j + 1) * w, i * w : (i + 1) * w] = own.T
        return result

    def sample(self, sides: Sequence[Side]) -> Tensor:
        """Sampled vectors float32 ``[S, len(sides) * W]``, in the order of the text."""
        return torch.cat([torch.cat(self._samples[self._place[side]]) for side in sides], dim=1)

    @property
    def _longest(self) -> int:
        return max(self._band, self._shared_band)

    def _apart(self, p: int, q: int) -> float:
        """Layers from one place to another, infinite where they share no blocks."""
        (group, depth), (other, other_depth) = (self._depth[self.sides[place][0]] for place in (p, q))
        return abs(depth - other_depth) if group == other else float("inf")

    def _is_past(self, p: int, q: int) -> bool:
        """Whether nothing that comes at place ``q`` or later may share a block with ``p``."""
        return self._longest <= self._apart(p, q) < float("inf")

    def _may_share(self, p: int, q: int) -> bool:
        near = self._apart(p, q)
        return near < self._shared_band or (self.sides[p][1] == self.sides[q][1] and near < self._band)


@dataclass(frozen=True)
class Effect:
    """How the effect of errors is measured.

    Attributes:
        windows: token ids int64 ``[N, T]``.
        cache: which recent tokens are read exactly, with the window that is read.
        seed: of the tokens drawn.
    """

    windows: Tensor
    cache: CacheConfig
    window_read: int
    seed: int


@dataclass(frozen=True)
class Statistics:
    """Of one model on one text.

    Attributes:
        geometry: the model's cache.
        sides: second moments of keys (before RoPE) and values.
        metrics: (layer, kind) -> what errors cost, positive definite float64 ``[H * D, H * D]``, nats; None where it was
            not measured.
    """

    geometry: KVGeometry
    sides: SideMoments
    metrics: dict[Side, Tensor] | None = None
    _bases: dict[tuple[Slots, Metric], Basis] = field(default_factory=dict)

    def basis(self, slots: Slots, metric: Metric) -> Basis:
        """Basis of a block, whose slots of a side follow each other; kept, as it takes long for wide blocks."""
        if (slots, metric) not in self._bases:
            metrics = self._metrics_of(slots) if metric == "effect" else None
            self._bases[slots, metric] = principal_basis(self.mean(slots), self.covariance(slots), metrics)
        return self._bases[slots, metric]

    def variances(self, slots: Slots) -> Tensor:
        """Variances of a block's basis under the effect metric, falling, without the basis itself."""
        roots = [torch.linalg.cholesky(metric).float() for metric in self._metrics_of(slots)]
        # The spectrum of L' C L is that of the symmetric root's product; in float32, as what matters is far above its errors.
        weighted = times_blocks(blocks_times([root.T for root in roots], self.covariance(slots).float()), roots)
        return torch.linalg.eigvalsh(weighted).double().flip(0).clamp_min(0)

    def mean(self, slots: Slots) -> Tensor:
        """Mean float64 ``[W]`` of a block."""
        return self.sides.mean(sides_of(slots))[self._columns(slots)]

    def covariance(self, slots: Slots) -> Tensor:
        """Covariance float64 ``[W, W]`` of a block."""
        columns = self._columns(slots)
        return self.sides.covariance(sides_of(slots))[columns][:, columns]

    def variance(self, slots: Slots) -> Tensor:
        """Variance float64 ``[W]`` of every element of a block, however far apart its layers are."""
        sides = sides_of(slots)
        return torch.cat([self.sides.covariance([side]).diagonal() for side in sides])[self._columns(slots)]

    def sample(self, slots: Slots) -> Tensor:
        """Sampled vectors float32 ``[S, W]`` of a block, in the order of the text."""
        return self.sides.sample(sides_of(slots))[:, self._columns(slots)]

    def _columns(self, slots: Slots) -> Tensor:
        sides, dim, heads = sides_of(slots), self.geometry.head_dim, self.geometry.kv_heads
        starts = [(sides.index((s.layer, s.kind)) * heads + s.head) * dim for s in slots]
        return torch.cat([torch.arange(start, start + dim) for start in starts])

    def rounded_metrics(self, slots: Slots) -> list[RoundedMetric]:
        """Metrics of a block in 8 bits; the same as those that its basis is of."""
        return [RoundedMetric(metric) for metric in self._metrics_of(slots)]

    def _metrics_of(self, slots: Slots) -> list[Tensor]:
        """Metrics along the diagonal: of every side, or of every group of its heads."""
        assert self.metrics is not None, "the effect of errors was not measured"
        dim, found = self.geometry.head_dim, []
        together = heads_of_metric(dim)
        for side in sides_of(slots):
            heads = [s.head for s in slots if (s.layer, s.kind) == side]
            for _, group in groupby(heads, lambda head: head // together):
                own = torch.cat([torch.arange(head * dim, (head + 1) * dim) for head in group])
                found.append(self.metrics[side][own][:, own])
        return found


def heads_of_metric(head_dim: int) -> int:
    """Heads of a side that a metric is of."""
    return max(1, METRIC_ELEMENTS // head_dim)


def rounded(metric: Tensor, head_dim: int) -> Tensor:
    """A side's metric as bundles store it: 8 bits, of groups of heads."""
    size = heads_of_metric(head_dim) * head_dim
    groups = [slice(first, first + size) for first in range(0, len(metric), size)]
    return torch.block_diag(*(RoundedMetric(metric[own, own]).matrix() for own in groups))


def sides_of(slots: Slots) -> list[Side]:
    """Sides in the order in which a block's slots name them."""
    return list(dict.fromkeys((slot.layer, slot.kind) for slot in slots))


def _depths(groups: Iterable[Sequence[int]]) -> dict[int, tuple[int, int]]:
    """Each layer's group and place in it."""
    return {layer: (index, place) for index, group in enumerate(groups) for place, layer in enumerate(group)}


def bands_of(geometry: KVGeometry, blocks: Iterable[Slots]) -> tuple[int, int]:
    """Layers within which some blocks code sides of one kind together, and sides of both."""
    depth = _depths(geometry.codable_groups)
    band = shared = 0
    for slots in blocks:
        depths = [depth[slot.layer][1] for slot in slots]
        span = max(depths) - min(depths) + 1
        band = max(band, span)
        shared = max(shared, span if len({slot.kind for slot in slots}) > 1 else 0)
    return max(band, 1), shared


def collect_statistics(
    model: PreTrainedModel,
    geometry: KVGeometry,
    windows: Tensor,
    bands: tuple[int, int],
    sinks: int = 4,
    stride: int = 1,
    effect: Effect | None = None,
    on_progress: OnProgress = silent,
) -> Statistics:
    """One pass forwards over ``windows`` for moments and, if asked, one forwards and backwards for the effect of errors.

    Args:
        model: a causal language model; only run, never changed.
        geometry: its cache.
        windows: token ids int64 ``[N, T]``.
        bands: layers of the longest block of one kind that will be asked for, and of one that keys and values share.
        sinks: first tokens, left out.
        stride: distance between sampled tokens; see ``sample_stride``.
        effect: how the effect of errors is measured; that needs sdpa attention.
        on_progress: called with what is going on.

    Under ``accelerate launch`` each process runs its share of the windows, and all end with the statistics of all windows.
    """
    sides: list[Side] = [(layer, kind) for layer in geometry.codable_layers for kind in KINDS]
    moments = SideMoments(sides, geometry.kv_heads * geometry.head_dim, *bands, stride, geometry.codable_groups)
    blocks = [tuple(Slot(layer, head, kind) for head in range(geometry.kv_heads)) for layer, kind in sides]
    own = own_share(windows)
    count = counter(on_progress, "capture keys and values", own.shape[0] * (own.shape[1] - sinks))
    count(0)
    for tokens in capture(model, geometry, own, blocks, sinks, lambda i, x: moments.add(sides[i], x)):
        count(tokens)
    moments.reduce()
    if effect is None:
        return Statistics(geometry, moments)
    probe = EffectProbe(model, geometry, sinks, effect.cache.step_tokens, effect.window_read, effect.seed)
    metrics = effect_metrics(probe, effect.windows, on_progress)
    # Rounded from the start, so that directions and bits are found for the metric that codecs are made of.
    if missing := sorted({layer for layer, kind in sides if (layer, kind) not in metrics}):
        log.warning(
            "no gradient reaches keys or values of layers %s: plain errors are measured instead of their effect",
            missing,
        )
        damp = {side: torch.diag(1 / moments.covariance([side]).diagonal().clamp_min(1e-12)) for side in sides}
    else:
        damp = {side: damped(metrics[side], moments.covariance([side])) for side in sides}
    return Statistics(geometry, moments, {side: rounded(metric, geometry.head_dim) for side, metric in damp.items()})


def sample_stride(windows: Tensor, sinks: int, tokens: int = SAMPLE_TOKENS) -> int:
    """Distance between sampled tokens for a sample of at least ``tokens``."""
    return max(1, windows.shape[0] * (windows.shape[1] - sinks) // tokens)
