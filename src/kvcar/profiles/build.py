"""From statistics to a plan and its codecs: blocks under two budgets, bits by effect, everything in nats."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from ..bundle import CodedBlock
from ..errors import FitError
from ..fit.solve import Basis, groups_of, linear_codec
from ..plan import Block, Plan
from ..planner.bits import allocate_bits
from ..planner.budget import bits_for
from ..planner.partition import Run, error_of, partition
from ..progress import OnProgress
from ..shapes import KINDS, Kind, KVGeometry
from .options import Profile, ProfileOptions
from .statistics import Slots, Statistics

_RUN_LENGTHS = (1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30, 40, 60, 80)


@dataclass(frozen=True)
class Solved:
    """A plan with its codecs, and the divergence that the quadratic model of errors predicts for it, nats per token."""

    plan: Plan
    blocks: tuple[CodedBlock, ...]
    predicted_kl: float


def longest_run(geometry: KVGeometry, profile: Profile) -> int:
    """Layers of the longest block that a profile allows."""
    width = geometry.kv_heads * geometry.head_dim
    return max(1, min(len(geometry.codable_layers), profile.widest_elements // width))


def choose_blocks(statistics: Statistics, profile: Profile, budget_bits: float, on_progress: OnProgress) -> list[Slots]:
    """Blocks of adjacent layers, keys and values apart, that cost least within the profile's limits.

    Layers wider than the profile's widest block are cut into groups of heads instead.
    """
    geometry = statistics.geometry
    layers, width = geometry.codable_layers, geometry.kv_heads * geometry.head_dim
    if width > profile.widest_elements:
        return [slots for layer in layers for kind in KINDS for slots in _head_groups(geometry, layer, kind, profile)]
    most = longest_run(geometry, profile)
    if profile.flops_per_element is None:
        # Wider never costs more bits, so without a limit on FLOPs the longest even runs are best.
        return [_slots(geometry, run, kind) for run in _even_runs(len(layers), most) for kind in KINDS]
    runs = [(first, n) for n in _RUN_LENGTHS if n <= most for first in range(len(layers) - n + 1)]
    sides: list[dict[Run, Tensor]] = []
    for kind in KINDS:
        side: dict[Run, Tensor] = {}
        for run in runs:
            side[run] = statistics.variances(_slots(geometry, run, kind))
            on_progress("try blocks", len(sides) * len(runs) + len(side), len(KINDS) * len(runs))
        sides.append(side)
    flops = profile.flops_per_element * 2 * width * len(layers)
    cuts = partition(len(layers), sides, budget_bits, flops)
    return [_slots(geometry, run, kind) for kind, cut in zip(KINDS, cuts, strict=True) for run in cut]


def empty_plan(geometry: KVGeometry, blocks: list[Slots], options: ProfileOptions) -> Plan:
    """The plan whose blocks have no bits yet."""
    return Plan(
        geometry=geometry, blocks=tuple(Block(codec="linear", slots=slots) for slots in blocks), sinks=options.sinks,
        window=options.window, page_tokens=options.page_tokens, exact_dtype="bfloat16",
    )  # fmt: skip


def solve(
    statistics: Statistics, plan: Plan, times_smaller: float, model_bytes: int, on_progress: OnProgress
) -> Solved:
    """Bits and codecs of a plan's blocks at a size.

    Raises:
        FitError: what stays exact is already larger than the target allows.
    """
    budget = bits_for(plan, times_smaller, model_bytes)
    bases = bases_of(statistics, plan, on_progress)
    variances = [basis.variances for basis in bases]
    bits = allocate_bits(variances, budget)
    predicted = sum(error_of(v, b) for v, b in zip(variances, bits, strict=True))
    coded, blocks = [], []
    for block, basis, own in zip(plan.blocks, bases, bits, strict=True):
        if not int(own.sum()):
            own[0] = 1  # a block that gets no bits at all still needs one latent to be a block
        codec, quantizer = linear_codec(basis, own, statistics.sample(block.slots))
        coded.append(CodedBlock(codec, quantizer))
        blocks.append(block.model_copy(update={"groups": groups_of(own)}))
    return Solved(plan.model_copy(update={"blocks": tuple(blocks)}), tuple(coded), predicted)


def bases_of(statistics: Statistics, plan: Plan, on_progress: OnProgress) -> list[Basis]:
    """The basis of every block."""
    bases = []
    for index, block in enumerate(plan.blocks):
        bases.append(statistics.basis(block.slots))
        on_progress("fit linear codecs", index + 1, len(plan.blocks))
    return bases


def predicted_curve(
    statistics: Statistics, plan: Plan, sizes: tuple[float, ...], model_bytes: int
) -> list[tuple[float, float]]:
    """(times smaller, predicted KL divergence) at the sizes that are within reach."""
    variances = [statistics.basis(block.slots).variances for block in plan.blocks]
    curve = []
    for size in sizes:
        try:
            bits = allocate_bits(variances, bits_for(plan, size, model_bytes))
        except FitError:
            break  # larger sizes are out of reach too
        curve.append((size, sum(error_of(v, b) for v, b in zip(variances, bits, strict=True))))
    return curve


def _slots(geometry: KVGeometry, run: Run, kind: Kind) -> Slots:
    layers = geometry.codable_layers[run[0] : run[0] + run[1]]
    return tuple(s for layer in layers for s in geometry.slots(kind) if s.layer == layer)


def _even_runs(layers: int, most: int) -> Iterator[Run]:
    count = -(-layers // most)
    first = 0
    for index in range(count):
        size = (layers - first) // (count - index)
        yield first, size
        first += size


def _head_groups(geometry: KVGeometry, layer: int, kind: Kind, profile: Profile) -> Iterator[Slots]:
    slots = tuple(s for s in geometry.slots(kind) if s.layer == layer)
    for first, size in _even_runs(len(slots), max(1, profile.widest_elements // geometry.head_dim)):
        yield slots[first : first + size]
