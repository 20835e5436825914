"""From a partition and statistics to bits and codecs: what each codec's fit does. Adding a codec: one solver here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..bundle import CodedBlock
from ..codecs import Codec, DynamicQuantizer, IdentityCodec, Quantizer
from ..errors import FitError, InputError
from ..plan import BitGroup, Block, Plan
from ..progress import OnProgress
from ..registry import Registry
from .autoencoder import train_autoencoder
from .basis import Basis, fit_quantizer, groups_of, linear8_codec, linear_codec
from .bits import allocate_bits, allocate_priced_bits, bits_for, error_of, kept_share, share_latents
from .options import FitOptions, Structure
from .partition import flops_budget, flops_per_latent, row_bits
from .statistics import Statistics
from .stored import solve_entropy_coded, stored_bits_per_token


@dataclass(frozen=True)
class Budget:
    """What blocks may spend.

    Attributes:
        bits: per token, all blocks together.
        latents: latents of each block where their number is given; None where the solver decides.
    """

    bits: float
    latents: tuple[int, ...] | None = None


@dataclass(frozen=True)
class FittedBlock:
    """A block of the plan, what codes it, and the divergence that its errors are expected to cost, nats per token."""

    block: Block
    coded: CodedBlock
    expected_kl: float = 0.0


@dataclass(frozen=True)
class Solved:
    """A plan with its codecs, and the divergence that the quadratic model of errors expects of it, nats per token."""

    plan: Plan
    blocks: tuple[CodedBlock, ...]
    expected_kl: float


Solver = Callable[[Plan, Statistics, Budget, FitOptions, OnProgress], Iterator[FittedBlock]]
"""(plan without bits, statistics, what to spend, options, progress) -> a fitted block for each of the plan's, in order."""

SOLVERS: Registry[Solver] = Registry("codec with a fit")


def solve(plan: Plan, statistics: Statistics, budget: Budget, options: FitOptions, on_progress: OnProgress) -> Solved:
    """Bits and codecs for a plan's blocks."""
    solver = _solve_stored if options.entropy_coded else SOLVERS[options.codec]
    fitted: list[FittedBlock] = []
    for own in solver(plan, statistics, budget, options, on_progress):
        fitted.append(own)
        on_progress(f"fit {options.codec} codecs", len(fitted), len(plan.blocks))
    planned = plan.model_copy(update={"blocks": tuple(own.block for own in fitted)})
    return Solved(planned, tuple(own.coded for own in fitted), sum(own.expected_kl for own in fitted))


def budget_for(plan: Plan, options: FitOptions, times_smaller: float, model_bytes: int) -> Budget:
    """What the blocks of a plan may spend: as a structure fixes it, or what a size leaves.

    Raises:
        FitError: what stays exact is already larger than the size allows.
        InputError: more latents than a block has elements.
    """
    given = options.structure
    if options.entropy_coded:
        return Budget(stored_bits_per_token(plan, times_smaller))
    if given is not None and given.latents is not None:
        return Budget(0, tuple(_even_share(block, plan, given) for block in plan.blocks))
    if given is not None and given.bits is not None:
        return Budget(int(given.bits * sum(len(block.slots) for block in plan.blocks) * plan.geometry.head_dim))
    if given is not None and given.scales == "dynamic":
        # The scales' bytes are part of what is fixed, not of what latents may spend.
        scaled = BitGroup(bits=given.latent_bits, count=1)
        blocks = tuple(b.model_copy(update={"groups": (scaled,), "scales": "dynamic"}) for b in plan.blocks)
        plan = plan.model_copy(update={"blocks": blocks})
    return Budget(bits_for(plan, times_smaller, model_bytes))


def _even_share(block: Block, plan: Plan, given: Structure) -> int:
    """A block's share of the latents asked for a whole layer."""
    assert given.latents is not None
    per_kind = dict(zip(("key", "value"), given.latents, strict=True))
    latents = sum(per_kind[slot.kind] for slot in block.slots) / plan.geometry.kv_heads
    width = len(block.slots) * plan.geometry.head_dim
    if latents > width:
        raise InputError(f"{latents:g} latents are more than the {width} elements of a block; ask for fewer")
    return max(1, round(latents))


def bases_of(plan: Plan, statistics: Statistics, options: FitOptions, on_progress: OnProgress) -> list[Basis]:
    """The basis of every block, under the metric that the options ask for."""
    bases = []
    for block in plan.blocks:
        bases.append(statistics.basis(block.slots, options.metric))
        on_progress("find directions", len(bases), len(plan.blocks))
    return bases


def bits_of(plan: Plan, variances: Sequence[Tensor], budget: Budget, options: FitOptions) -> list[Tensor]:
    """Bits of every latent of every block; where decode steps are limited, fewer latents may take them."""
    if budget.latents is not None:
        shares = _shared_latents(variances, budget.latents, options)
        return [_first_latents(len(v), n, options) for v, n in zip(variances, shares, strict=True)]
    limits, shares = options.limits, [kept_share(plan.geometry, block.slots[0].layer) for block in plan.blocks]
    if limits is None:
        return allocate_bits(variances, int(budget.bits), shares)
    rows = [row_bits(len(v), options.tokens_in_memory) for v in variances]
    flops, allowed = [flops_per_latent(plan.geometry, limits, block) for block in plan.blocks], None
    if limits.flops_of == "step" and limits.flops_per_element is not None:
        allowed = flops_budget(plan.geometry, limits)
    return allocate_priced_bits(variances, rows, flops, int(budget.bits), allowed, shares)


def _shared_latents(variances: Sequence[Tensor], given: tuple[int, ...], options: FitOptions) -> tuple[int, ...]:
    """Latents of each block: as given, or as many in all where variances of all blocks are in one currency."""
    return share_latents(variances, sum(given)) if options.metric == "effect" else given


def _first_latents(width: int, latents: int, options: FitOptions) -> Tensor:
    """Bits of a block's directions when just the first ``latents`` are kept: the paper's cut of rank."""
    assert options.structure is not None
    bits = torch.zeros(width, dtype=torch.int64)
    bits[:latents] = options.structure.latent_bits
    return bits


@SOLVERS.register("linear")
@SOLVERS.register("linear8")
def solve_linear(
    plan: Plan, statistics: Statistics, budget: Budget, options: FitOptions, on_progress: OnProgress
) -> Iterator[FittedBlock]:
    """PCA of every block under the metric, bits pooled over all of them."""
    bases = bases_of(plan, statistics, options, on_progress)
    bits = bits_of(plan, [basis.variances for basis in bases], budget, options)
    raw, page = budget.latents is not None, plan.page_tokens if options.trellis else None
    for block, basis, own in zip(plan.blocks, bases, bits, strict=True):
        expected = 0.0 if raw else error_of(basis.variances, own)
        if not int(own.sum()):
            own[0] = 1  # a block that gets no bits at all still needs one latent to be a block
        sample = statistics.sample(block.slots)
        if options.codec == "linear":
            codec, quantizer = linear_codec(basis, own, sample)
        else:
            metrics = statistics.rounded_metrics(block.slots)
            codec, quantizer = linear8_codec(basis, own, sample, metrics, plan.geometry.head_dim, page)
        yield _fitted(block, groups_of(own), codec, quantizer, options, expected)


@SOLVERS.register("autoencoder")
def solve_autoencoder(
    plan: Plan, statistics: Statistics, budget: Budget, options: FitOptions, on_progress: OnProgress
) -> Iterator[FittedBlock]:
    """The paper's autoencoder for every block, bits shared by width."""
    bases, given = bases_of(plan, statistics, options, on_progress), options.structure
    assert given is not None
    widths = [len(basis.mean) for basis in bases]
    if budget.latents is not None:
        latents = _shared_latents([basis.variances for basis in bases], budget.latents, options)
    else:
        shares = [budget.bits * width / sum(widths) for width in widths]
        latents = tuple(min(int(s / given.latent_bits), w) for s, w in zip(shares, widths, strict=True))
        if min(latents) < 1:
            raise FitError(
                f"{min(shares):.0f} bits per token for a block of {min(widths)} elements leave no latent of "
                f"{given.latent_bits} bits; ask for a larger cache or fewer latent bits"
            )
    for block, basis, count in zip(plan.blocks, bases, latents, strict=True):
        sample = statistics.sample(block.slots)
        codec, quantizer = train_autoencoder(basis, count, given.latent_bits, sample, given.steps, options.seed)
        yield _fitted(block, (BitGroup(bits=given.latent_bits, count=count),), codec, quantizer, options)


@SOLVERS.register("identity")
def solve_identity(
    plan: Plan, statistics: Statistics, budget: Budget, options: FitOptions, on_progress: OnProgress
) -> Iterator[FittedBlock]:
    """Elements quantised as they are: every element of a block gets the same bits, or one more."""
    del options, on_progress
    widths = [len(block.slots) * plan.geometry.head_dim for block in plan.blocks]
    for block, width in zip(plan.blocks, widths, strict=True):
        low, extra = divmod(int(budget.bits * width / sum(widths)), width)
        if low < 1:
            raise FitError("the identity codec needs at least 1 bit per element; ask for a larger cache")
        bits = torch.full((width,), min(low, 8))
        if low < 8:
            bits[:extra] += 1
        codec = IdentityCodec(torch.argsort(bits, descending=True, stable=True))
        groups = groups_of(bits)
        quantizer = fit_quantizer(groups, codec.encode(statistics.sample(block.slots)))
        yield FittedBlock(block.model_copy(update={"groups": groups}), CodedBlock(codec, quantizer))


def _solve_stored(
    plan: Plan, statistics: Statistics, budget: Budget, options: FitOptions, on_progress: OnProgress
) -> Iterator[FittedBlock]:
    """Linear codecs with uniform steps, for codes that take their entropy."""
    bases = bases_of(plan, statistics, options, on_progress)
    samples = (statistics.sample(block.slots) for block in plan.blocks)
    metrics = (statistics.rounded_metrics(block.slots) for block in plan.blocks)
    solved = solve_entropy_coded(bases, metrics, samples, budget.bits, plan.geometry.head_dim)
    for block, (groups, coded, expected) in zip(plan.blocks, solved, strict=True):
        yield FittedBlock(block.model_copy(update={"groups": groups}), coded, expected)


def _fitted(
    block: Block,
    groups: tuple[BitGroup, ...],
    codec: Codec,
    quantizer: Quantizer,
    options: FitOptions,
    expected_kl: float = 0.0,
) -> FittedBlock:
    """With the scales that the options ask for; dynamic ones replace what was fitted."""
    scales = "static" if options.structure is None else options.structure.scales
    if scales == "dynamic":
        quantizer = DynamicQuantizer(groups[0].bits)
    planned = block.model_copy(update={"groups": groups, "scales": scales})
    return FittedBlock(planned, CodedBlock(codec, quantizer), expected_kl)
