"""A partition: which slots share a block, before any of them has bits. Searched within a profile's limits, or given.

For a price of a bit, a block's cost is what its error does to the output plus what its bits cost, each latent at the whole
number of bits that suits it (reverse water-filling: Cover and Thomas, 10.3.3). A wider block never costs more that way, but
decoding it does; a second price, on FLOPs, decides how wide it pays to go. Layers are cut into runs by dynamic programming.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import InputError, UnsupportedModelError
from ..geometry import KINDS, Kind, KVGeometry, Slot
from ..plan import Block
from ..progress import OnProgress
from .bits import bits_at_price, error_of, kept_share, lowest_price, price_for
from .options import Profile, Structure
from .statistics import Slots, Statistics

# Of unpacking one code, in FLOPs that take as long.
_UNPACK_FLOPS = 32.0
_RUN_LENGTHS = (1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30, 40, 60, 80)

Kinds = tuple[Kind, ...]
Sharing = tuple[Kinds, ...]
JOINT: Sharing = (KINDS,)
SEPARATE: Sharing = tuple((kind,) for kind in KINDS)


@dataclass(frozen=True)
class Run:
    """Adjacent layers among those that may be coded: one block, or, of a single layer, ``parts`` blocks of as many heads."""

    first: int
    count: int
    parts: int = 1


class Candidate(NamedTuple):
    """What a run offers: variances of its latents, float ``[W]``, and what each of them costs, in FLOPs and bits per token.

    ``kept_share``: of a text's tokens that are kept; see ``bits.kept_share``.
    """

    variances: Tensor
    flops_per_latent: float
    codec_bits: float = 0.0
    kept_share: float = 1.0


@dataclass(frozen=True)
class RunCost:
    """One candidate at a price of a bit.

    Attributes:
        cost: error plus price times bits, in the unit of the error.
        flops: of one token.
    """

    cost: float
    flops: float


def given_partition(geometry: KVGeometry, structure: Structure) -> list[Slots]:
    """Blocks of the slots that a structure wants coded.

    Raises:
        InputError: layers or numbers that the model does not have, or nothing to code.
    """
    blocks = regular_blocks(geometry, structure.layers_per_block, structure.heads_per_block)
    wanted = geometry.codable_layers if structure.layers is None else structure.layers
    unknown = sorted(set(wanted) - set(geometry.codable_layers))
    if unknown or (not wanted and not structure.reuses):
        raise InputError(f"layers to compress must be among {list(geometry.codable_layers)}, got {list(wanted)}")
    left_out = {reuse.slot for reuse in structure.reuses}
    left_out |= {slot for slot in geometry.slots() if slot.layer not in wanted}
    kept = [tuple(slot for slot in block if slot not in left_out) for block in blocks]
    return [block for block in kept if block]


def regular_blocks(geometry: KVGeometry, layers_per_block: int, heads_per_block: int | None) -> list[Slots]:
    """Blocks of neighbouring layers and heads, keys and values apart; the last ones may be smaller.

    Args:
        geometry: the cache to partition; layers that stay exact are in no block.
        layers_per_block: codable layers of a block; those that keep a window share none with those that keep everything.
        heads_per_block: KV heads of a block, None for all of a layer.

    Raises:
        InputError: a number is not positive, or larger than what the model has.
        UnsupportedModelError: all its layers keep short windows.
    """
    groups = geometry.codable_groups
    heads = geometry.kv_heads if heads_per_block is None else heads_per_block
    if not groups:
        raise UnsupportedModelError(
            f"every layer of this model attends to a sliding window of {geometry.sliding_window} tokens and keeps no more, and windows "
            "of fewer than 512 tokens are not compressed; run it with its own cache"
        )
    if not 1 <= layers_per_block <= max(map(len, groups)):
        raise InputError(
            f"layers per block must be 1 to {max(map(len, groups))} for this model, got {layers_per_block}"
        )
    if not 1 <= heads <= geometry.kv_heads:
        raise InputError(f"heads per block must be 1 to {geometry.kv_heads} for this model, got {heads}")
    blocks = []
    runs = [
        group[first : first + layers_per_block] for group in groups for first in range(0, len(group), layers_per_block)
    ]
    for run in runs:
        for kind in KINDS:
            for head in range(0, geometry.kv_heads, heads):
                members = range(head, min(head + heads, geometry.kv_heads))
                blocks.append(tuple(Slot(layer, h, kind) for layer in run for h in members))
    return blocks


def widest_blocks(geometry: KVGeometry) -> list[Slots]:
    """One block of each kind for every group of layers that may share some."""
    return [
        tuple(slot for slot in geometry.slots(kind) if slot.layer in group)
        for group in geometry.codable_groups
        for kind in KINDS
    ]


def longest_run(geometry: KVGeometry, profile: Profile, kinds: int = 1) -> int:
    """Layers of the longest block of one kind that a profile allows, or of both."""
    width = geometry.kv_heads * geometry.head_dim * kinds
    return max(1, min(max(map(len, geometry.codable_groups), default=0), profile.widest_elements // width))


def _order(geometry: KVGeometry) -> tuple[int, ...]:
    """Layers in the order in which runs are cut: those that may share blocks follow each other."""
    return tuple(layer for group in geometry.codable_groups for layer in group)


def _shares_blocks(geometry: KVGeometry, run: Run) -> bool:
    """Whether all layers of a run may share a block."""
    layers = _order(geometry)[run.first : run.first + run.count]
    return len({layer in geometry.windowed_layers for layer in layers}) == 1


def searched_bands(geometry: KVGeometry, profile: Profile) -> tuple[int, int]:
    """Layers within which a profile may code sides of one kind together, and sides of both."""
    joint = JOINT in _sharings(geometry, profile)
    return longest_run(geometry, profile), longest_run(geometry, profile, 2) if joint else 0


def searched_partitions(
    statistics: Statistics, profile: Profile, budget_bits: int, memory_tokens: int, on_progress: OnProgress
) -> list[list[Slots]]:
    """Partitions of adjacent layers within a profile's limits: the best one of each sharing of keys and values that is tried.

    Layers wider than the profile's widest block are cut into groups of heads.
    """
    sharings = _sharings(statistics.geometry, profile)
    return [_blocks_of(statistics, profile, sharing, budget_bits, memory_tokens, on_progress) for sharing in sharings]


def _sharings(geometry: KVGeometry, profile: Profile) -> tuple[Sharing, ...]:
    """What is tried. In a decode step keys are decoded and values are not, so a latent of both would be read twice.

    Elsewhere keys and values together have won wherever both were tried.
    """
    fits = 2 * geometry.head_dim <= profile.widest_elements
    return (JOINT,) if fits and profile.flops_of == "decoding" else (SEPARATE,)


def _blocks_of(
    statistics: Statistics,
    profile: Profile,
    sharing: Sharing,
    budget_bits: float,
    memory_tokens: int,
    on_progress: OnProgress,
) -> list[Slots]:
    geometry, kinds = statistics.geometry, len(sharing[0])
    layers = _order(geometry)
    if profile.flops_per_element is None:
        # Wider never costs more bits, so without a limit on FLOPs the longest even runs are best.
        parts = min(_parts(geometry, profile, kinds))
        runs = [Run(first, 1, parts) for first in range(len(layers))]
        if parts == 1:
            longest, runs = longest_run(geometry, profile, kinds), []
            for group in geometry.codable_groups:
                runs += _even_runs(len(group), longest, sum(run.count for run in runs))
        return [slots for run in runs for own in sharing for slots in _slots(geometry, run, own)]
    runs = _candidate_runs(geometry, profile, kinds)
    sides: list[dict[Run, Candidate]] = []
    for own in sharing:
        side: dict[Run, Candidate] = {}
        for run in runs:
            variances = torch.cat([statistics.variances(slots) for slots in _slots(geometry, run, own)])
            row = row_bits(len(variances) // run.parts, memory_tokens)
            share = kept_share(geometry, layers[run.first])
            side[run] = Candidate(variances, _flops_per_latent(geometry, profile, run, own), row, share)
            on_progress("try blocks", len(sides) * len(runs) + len(side), len(sharing) * len(runs))
        sides.append(side)
    flops = flops_budget(geometry, profile)
    cuts = partition(len(layers), sides, budget_bits, flops, price_latents=profile.flops_of == "step")
    return [s for own, cut in zip(sharing, cuts, strict=True) for run in cut for s in _slots(geometry, run, own)]


def _candidate_runs(geometry: KVGeometry, profile: Profile, kinds: int) -> list[Run]:
    layers, parts = len(geometry.codable_layers), _parts(geometry, profile, kinds)
    longest = longest_run(geometry, profile, kinds) if 1 in parts else 0
    runs = [Run(first, n) for n in _RUN_LENGTHS if n <= longest for first in range(layers - n + 1)]
    runs = [run for run in runs if _shares_blocks(geometry, run)]
    # Separate heads where nothing else is narrow enough, or where narrow blocks are looked for.
    cuts = [p for p in parts if p > 1] if profile.flops_of == "step" else [] if longest else [min(parts)]
    return runs + [Run(first, 1, p) for p in cuts for first in range(layers)]


def _parts(geometry: KVGeometry, profile: Profile, kinds: int) -> list[int]:
    """Into how many groups of as many heads a layer may be cut so that each is narrow enough, fewest first."""
    heads, dim = geometry.kv_heads, geometry.head_dim * kinds
    found = [p for p in range(1, heads + 1) if heads % p == 0 and heads // p * dim <= profile.widest_elements]
    return found or [heads]


def row_bits(width: int, memory_tokens: int) -> float:
    """Bits per token that a latent's row of the codec takes, shared by all tokens in memory."""
    return 8.0 * width / memory_tokens


def _flops_per_latent(geometry: KVGeometry, profile: Profile, run: Run, kinds: Kinds) -> float:
    """FLOPs per token and latent of a run's blocks: of decoding all of it, or of a decode step over its layers."""
    width = geometry.kv_heads * geometry.head_dim / run.parts
    if profile.flops_of == "decoding":
        return 2.0 * run.count * width * len(kinds)
    # Keys that do not rotate are not decoded either: a latent meets every query head of its heads once.
    meets = [width if kind == "key" and geometry.rotary else geometry.query_heads / run.parts for kind in kinds]
    return run.count * sum(2.0 * each + _UNPACK_FLOPS for each in meets)


def flops_per_latent(geometry: KVGeometry, profile: Profile, block: Block) -> float:
    """The same of a block of a plan."""
    layers, heads = {s.layer for s in block.slots}, {s.head for s in block.slots}
    run = Run(min(layers), len(layers), geometry.kv_heads // len(heads))
    kinds: Kinds = tuple(kind for kind in KINDS if any(s.kind == kind for s in block.slots))
    return _flops_per_latent(geometry, profile, run, kinds)


def flops_budget(geometry: KVGeometry, profile: Profile) -> float:
    """FLOPs per token that all blocks may take."""
    assert profile.flops_per_element is not None
    return profile.flops_per_element * geometry.layer_elements_per_token * len(geometry.codable_layers)


def _slots(geometry: KVGeometry, run: Run, kinds: Kinds) -> list[Slots]:
    """Blocks of a run: one, or one for every group of heads. Sides follow each other: a layer's keys, then its values."""
    layers = _order(geometry)[run.first : run.first + run.count]
    size = geometry.kv_heads // run.parts
    groups = [range(first, first + size) for first in range(0, geometry.kv_heads, size)]
    return [tuple(Slot(layer, head, kind) for layer in layers for kind in kinds for head in heads) for heads in groups]


def _even_runs(layers: int, longest: int, start: int = 0) -> Iterator[Run]:
    count = -(-layers // longest)
    first = 0
    for index in range(count):
        size = (layers - first) // (count - index)
        yield Run(start + first, size)
        first += size


def run_cost(candidate: Candidate, price: float, flops_price: float = 0.0) -> RunCost:
    """Cost and FLOPs of a candidate at a price of a bit and one of a FLOP, which the cost leaves out."""
    row = price * candidate.codec_bits
    own = price * candidate.kept_share
    bits = bits_at_price(candidate.variances, own, flops_price * candidate.flops_per_latent + row)
    latents = int((bits > 0).sum())
    cost = error_of(candidate.variances, bits) + own * int(bits.sum()) + row * latents
    return RunCost(cost, candidate.flops_per_latent * latents)


def cut_into_runs(layers: int, candidates: Mapping[Run, RunCost], flops_price: float) -> list[Run]:
    """The runs that cover ``layers`` places in order at the least cost plus ``flops_price`` times FLOPs."""
    best: list[tuple[float, Run | None]] = [(0.0, None), *((float("inf"), None) for _ in range(layers))]
    for end in range(1, layers + 1):
        for run, own in candidates.items():
            if run.first + run.count == end:
                total = best[run.first][0] + own.cost + flops_price * own.flops
                if total < best[end][0]:
                    best[end] = (total, run)
    runs: list[Run] = []
    place = layers
    while place:
        run = best[place][1]
        if run is None:
            raise ValueError("the candidates do not cover all layers")
        runs.append(run)
        place = run.first
    return runs[::-1]


def partition(
    layers: int,
    sides: Sequence[Mapping[Run, Candidate]],
    budget_bits: float,
    flops_budget: float | None,
    price_latents: bool = False,
) -> list[list[Run]]:
    """Runs of layers for every side (keys, values), the same prices for all.

    Args:
        layers: how many may be coded.
        sides: every candidate run, one mapping for keys and one for values.
        budget_bits: bits per token of all blocks together.
        flops_budget: FLOPs of one token of all blocks; None for no limit.
        price_latents: whether bits will be shared by ``allocate_bits_and_flops``, which gives up latents to save FLOPs.
    """
    cuts = [_widest(layers, side) for side in sides]
    for _ in range(2):
        # Which cut is best depends on the price of a bit, and that, a little, on the cut.
        chosen = [side[run] for side, cut in zip(sides, cuts, strict=True) for run in cut]
        price = price_for([own.variances for own in chosen], budget_bits, [own.kept_share for own in chosen])
        cuts = _within_flops(layers, sides, price, flops_budget, price_latents)
    return cuts


def _within_flops(
    layers: int,
    sides: Sequence[Mapping[Run, Candidate]],
    price: float,
    budget: float | None,
    price_latents: bool,
) -> list[list[Run]]:
    """The cuts at the lowest price of a FLOP that keeps to the budget; the narrowest ones if none does."""

    def costs_at(flops_price: float) -> list[dict[Run, RunCost]]:
        return [{run: run_cost(own, price, flops_price) for run, own in side.items()} for side in sides]

    unpriced = costs_at(0.0)

    def cut(flops_price: float) -> tuple[list[list[Run]], float]:
        costs = costs_at(flops_price) if price_latents else unpriced
        cuts = [cut_into_runs(layers, own, flops_price) for own in costs]
        return cuts, sum(own[run].flops for own, runs in zip(costs, cuts, strict=True) for run in runs)

    return lowest_price(cut, budget)


def _widest(layers: int, side: Mapping[Run, Candidate]) -> list[Run]:
    """Any cover to begin with: from each place the longest run."""
    runs, place = [], 0
    while place < layers:
        run = max((r for r in side if r.first == place), key=lambda r: (r.count, -r.parts))
        runs.append(run)
        place += run.count
    return runs
