"""From statistics to a plan and its codecs: blocks under two budgets, bits by effect, everything in nats."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..bundle import CodedBlock
from ..errors import FitError
from .solve import Basis, groups_of, linear_codec
from ..plan import Block, CacheConfig, Plan
from .bits import allocate_bits
from .budget import bits_for
from .partition import Candidate, Run, allocate_bits_and_flops, error_of, partition
from ..progress import OnProgress
from ..geometry import KINDS, Kind, KVGeometry, Slot
from .profiles import Profile, ProfileOptions
from .statistics import Slots, Statistics

# Of unpacking one code, in FLOPs that take as long.
_UNPACK_FLOPS = 32.0
Kinds = tuple[Kind, ...]
Sharing = tuple[Kinds, ...]
_TOGETHER: Sharing = (KINDS,)
_APART: Sharing = tuple((kind,) for kind in KINDS)
_RUN_LENGTHS = (1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30, 40, 60, 80)


@dataclass(frozen=True)
class Solved:
    """A plan with its codecs, and the divergence that the quadratic model of errors predicts for it, nats per token."""

    plan: Plan
    blocks: tuple[CodedBlock, ...]
    predicted_kl: float


def longest_run(geometry: KVGeometry, profile: Profile, kinds: int = 1) -> int:
    """Layers of the longest block of one kind that a profile allows, or of both."""
    width = geometry.kv_heads * geometry.head_dim * kinds
    return max(1, min(len(geometry.codable_layers), profile.widest_elements // width))


def bands(geometry: KVGeometry, profile: Profile) -> tuple[int, int]:
    """Layers within which a profile may code sides of one kind together, and sides of both."""
    together = _TOGETHER in _sharings(geometry, profile)
    return longest_run(geometry, profile), longest_run(geometry, profile, 2) if together else 0


def block_options(
    statistics: Statistics, profile: Profile, budget_bits: int, on_progress: OnProgress
) -> list[list[Slots]]:
    """Blocks of adjacent layers within the profile's limits: the best with keys and values together, and with them apart.

    Layers wider than the profile's widest block are cut into groups of heads.
    """
    sharings = _sharings(statistics.geometry, profile)
    return [_blocks_of(statistics, profile, sharing, budget_bits, on_progress) for sharing in sharings]


def _sharings(geometry: KVGeometry, profile: Profile) -> tuple[Sharing, ...]:
    """What is tried. In a decode step keys are decoded and values are not, so a latent of both would be read twice."""
    fits = 2 * geometry.head_dim <= profile.widest_elements
    return (_TOGETHER, _APART) if fits and profile.flops_of == "decoding" else (_APART,)


def _blocks_of(
    statistics: Statistics, profile: Profile, sharing: Sharing, budget_bits: float, on_progress: OnProgress
) -> list[Slots]:
    geometry, kinds = statistics.geometry, len(sharing[0])
    layers = geometry.codable_layers
    if profile.flops_per_element is None:
        # Wider never costs more bits, so without a limit on FLOPs the longest even runs are best.
        parts = min(_parts(geometry, profile, kinds))
        runs = [Run(first, 1, parts) for first in range(len(layers))]
        if parts == 1:
            runs = list(_even_runs(len(layers), longest_run(geometry, profile, kinds)))
        return [slots for run in runs for own in sharing for slots in _slots(geometry, run, own)]
    runs = _candidate_runs(geometry, profile, kinds)
    sides: list[dict[Run, Candidate]] = []
    for own in sharing:
        side: dict[Run, Candidate] = {}
        for run in runs:
            variances = torch.cat([statistics.variances(slots) for slots in _slots(geometry, run, own)])
            side[run] = Candidate(variances, _flops_per_latent(geometry, profile, run, own))
            on_progress("try blocks", len(sides) * len(runs) + len(side), len(sharing) * len(runs))
        sides.append(side)
    flops = _flops_budget(geometry, profile)
    cuts = partition(len(layers), sides, budget_bits, flops, price_latents=profile.flops_of == "step")
    return [s for own, cut in zip(sharing, cuts, strict=True) for run in cut for s in _slots(geometry, run, own)]


def _candidate_runs(geometry: KVGeometry, profile: Profile, kinds: int) -> list[Run]:
    layers, parts = len(geometry.codable_layers), _parts(geometry, profile, kinds)
    most = longest_run(geometry, profile, kinds) if 1 in parts else 0
    runs = [Run(first, n) for n in _RUN_LENGTHS if n <= most for first in range(layers - n + 1)]
    # Heads apart where that is all that is narrow enough, or where narrow blocks are what is looked for.
    apart = [p for p in parts if p > 1] if profile.flops_of == "step" else [] if most else [min(parts)]
    return runs + [Run(first, 1, p) for p in apart for first in range(layers)]


def _parts(geometry: KVGeometry, profile: Profile, kinds: int) -> list[int]:
    """Into how many groups of as many heads a layer may be cut so that each is narrow enough, fewest first."""
    heads, dim = geometry.kv_heads, geometry.head_dim * kinds
    found = [p for p in range(1, heads + 1) if heads % p == 0 and heads // p * dim <= profile.widest_elements]
    return found or [heads]


def _flops_per_latent(geometry: KVGeometry, profile: Profile, run: Run, kinds: Kinds) -> float:
    """FLOPs per token and latent of a run's blocks: of decoding all of it, or of a decode step over its layers."""
    width = geometry.kv_heads * geometry.head_dim / run.parts
    if profile.flops_of == "decoding":
        return 2.0 * run.count * width * len(kinds)
    # Keys that do not rotate are not decoded either: a latent meets every query head of its heads once.
    meets = [width if kind == "key" and geometry.rotary else geometry.query_heads / run.parts for kind in kinds]
    return run.count * sum(2.0 * each + _UNPACK_FLOPS for each in meets)


def _flops_budget(geometry: KVGeometry, profile: Profile) -> float:
    assert profile.flops_per_element is not None
    return profile.flops_per_element * geometry.layer_elements_per_token * len(geometry.codable_layers)


def _bits(plan: Plan, profile: Profile, variances: list[Tensor], budget: int) -> list[Tensor]:
    """Bits of all latents; where decode steps are limited, fewer latents may take them."""
    if profile.flops_of == "decoding" or profile.flops_per_element is None:
        return allocate_bits(variances, budget)
    flops = []
    for block in plan.blocks:
        layers, heads = {s.layer for s in block.slots}, {s.head for s in block.slots}
        run = Run(min(layers), len(layers), plan.geometry.kv_heads // len(heads))
        flops.append(
            _flops_per_latent(
                plan.geometry, profile, run, tuple(k for k in KINDS if any(s.kind == k for s in block.slots))
            )
        )
    return allocate_bits_and_flops(variances, flops, budget, _flops_budget(plan.geometry, profile))


def empty_plan(geometry: KVGeometry, blocks: list[Slots], options: ProfileOptions) -> Plan:
    """The plan whose blocks have no bits yet."""
    return Plan(
        geometry=geometry, blocks=tuple(Block(codec="linear", slots=slots) for slots in blocks), 
        cache=CacheConfig(options.window, options.sinks, options.page_tokens), exact_dtype="bfloat16",
    )  # fmt: skip


def solve(
    statistics: Statistics,
    plan: Plan,
    profile: Profile,
    times_smaller: float,
    model_bytes: int,
    on_progress: OnProgress,
) -> Solved:
    """Bits and codecs of a plan's blocks at a size.

    Raises:
        FitError: what stays exact is already larger than the target allows.
    """
    budget = bits_for(plan, times_smaller, model_bytes)
    bases = bases_of(statistics, plan, on_progress)
    variances = [basis.variances for basis in bases]
    bits = _bits(plan, profile, variances, budget)
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
    statistics: Statistics, plan: Plan, profile: Profile, sizes: tuple[float, ...], model_bytes: int
) -> list[tuple[float, float]]:
    """(times smaller, predicted KL divergence) at the sizes that are within reach."""
    variances = [statistics.basis(block.slots).variances for block in plan.blocks]
    curve = []
    for size in sizes:
        try:
            bits = _bits(plan, profile, variances, bits_for(plan, size, model_bytes))
        except FitError:
            break  # larger sizes are out of reach too
        curve.append((size, sum(error_of(v, b) for v, b in zip(variances, bits, strict=True))))
    return curve


def _slots(geometry: KVGeometry, run: Run, kinds: Kinds) -> list[Slots]:
    """Blocks of a run: one, or one for every group of heads. Sides follow each other: a layer's keys, then its values."""
    layers = geometry.codable_layers[run.first : run.first + run.count]
    size = geometry.kv_heads // run.parts
    groups = [range(first, first + size) for first in range(0, geometry.kv_heads, size)]
    return [tuple(Slot(layer, head, kind) for layer in layers for kind in kinds for head in heads) for heads in groups]


def _even_runs(layers: int, most: int) -> Iterator[Run]:
    count = -(-layers // most)
    first = 0
    for index in range(count):
        size = (layers - first) // (count - index)
        yield Run(first, size)
        first += size
