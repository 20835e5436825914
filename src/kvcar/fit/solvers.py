"""How each codec is fitted, given statistics of all blocks and bits to share among them. Adding a codec: one here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..codecs import Codec, DynamicQuantizer, IdentityCodec, Quantizer
from ..errors import FitError
from ..plan import BitGroup, Block
from .bits import allocate_bits, share_latents
from ..registry import Registry
from ..geometry import Slot
from ..paper.autoencoder import train_autoencoder
from .moments import Moments
from .options import FitOptions
from .quantize import fit_quantizer
from .solve import Basis, groups_of, linear_codec, principal_basis


@dataclass(frozen=True)
class FittedBlock:
    """A block of the plan and what codes it."""

    block: Block
    codec: Codec
    quantizer: Quantizer


@dataclass(frozen=True)
class Budget:
    """What blocks may spend.

    Attributes:
        bits: per token, all blocks together.
        latents: latents of each block where the options fix them; None where the solver decides.
    """

    bits: int
    latents: tuple[int, ...] | None = None


Slots = tuple[Slot, ...]
Solver = Callable[[Sequence[Slots], Mapping[Slots, Moments], Budget, FitOptions], Iterator[FittedBlock]]
"""(blocks, their moments, what to spend, options) -> a fitted block for each, in order."""

SOLVERS: Registry[Solver] = Registry("codec with a fit")


@SOLVERS.register("linear")
def solve_linear(
    blocks: Sequence[Slots], stats: Mapping[Slots, Moments], budget: Budget, options: FitOptions
) -> Iterator[FittedBlock]:
    """PCA of every block, bits pooled over all of them."""
    bases = [_basis(stats[block]) for block in blocks]
    if budget.latents is None:
        bits = allocate_bits([basis.variances for basis in bases], budget.bits)
    else:
        latents = _latents(bases, budget.latents, options)
        bits = [_first_latents(len(b.mean), n, options) for b, n in zip(bases, latents, strict=True)]
    for block, basis, own in zip(blocks, bases, bits, strict=True):
        if not int(own.sum()):
            # A block that gets no bits at all still needs one latent to be a block.
            own[0] = 1
        codec, quantizer = linear_codec(basis, own, stats[block].sample)
        yield _fitted(block, groups_of(own), codec, quantizer, options)


@SOLVERS.register("autoencoder")
def solve_autoencoder(
    blocks: Sequence[Slots], stats: Mapping[Slots, Moments], budget: Budget, options: FitOptions
) -> Iterator[FittedBlock]:
    """The paper's autoencoder for every block, bits shared by width."""
    widths = [len(stats[block].mean) for block in blocks]
    bases = [_basis(stats[block]) for block in blocks]
    given = None if budget.latents is None else _latents(bases, budget.latents, options)
    for index, (block, width) in enumerate(zip(blocks, widths, strict=True)):
        share = budget.bits * width / sum(widths)
        latents = given[index] if given else min(int(share / options.latent_bits), width)
        if latents < 1:
            raise FitError(
                f"{share:.0f} bits per token for a block of {width} elements leave no latent of "
                f"{options.latent_bits} bits; ask for a larger cache or fewer latent bits"
            )
        sample = stats[block].sample
        codec, quantizer = train_autoencoder(
            bases[index], latents, options.latent_bits, sample, options.steps, options.seed
        )
        groups = (BitGroup(bits=options.latent_bits, count=latents),)
        yield _fitted(block, groups, codec, quantizer, options)


def _basis(moments: Moments) -> Basis:
    return principal_basis(moments.mean, moments.covariance, moments.metrics)


def _latents(bases: Sequence[Basis], given: tuple[int, ...], options: FitOptions) -> tuple[int, ...]:
    """Latents of each block: as given, or as many in all where variances of all blocks are in one currency."""
    return share_latents([basis.variances for basis in bases], sum(given)) if options.metric == "effect" else given


def _first_latents(width: int, latents: int, options: FitOptions) -> torch.Tensor:
    """Bits of a block's directions when just the first ``latents`` are kept: the paper's cut of rank."""
    bits = torch.zeros(width, dtype=torch.int64)
    bits[:latents] = options.latent_bits
    return bits


def _fitted(
    slots: Slots, groups: tuple[BitGroup, ...], codec: Codec, quantizer: Quantizer, options: FitOptions
) -> FittedBlock:
    """With the scales that the options ask for; dynamic ones replace what was fitted."""
    block = Block(codec=options.codec, slots=slots, groups=groups, scales=options.scales)
    return FittedBlock(block, codec, DynamicQuantizer(groups[0].bits) if options.scales == "dynamic" else quantizer)


@SOLVERS.register("identity")
def solve_identity(
    blocks: Sequence[Slots], stats: Mapping[Slots, Moments], budget: Budget, options: FitOptions
) -> Iterator[FittedBlock]:
    """Elements quantised as they are: every element of a block gets the same bits, or one more."""
    total = sum(len(stats[block].mean) for block in blocks)
    for block in blocks:
        width = len(stats[block].mean)
        low, extra = divmod(int(budget.bits * width / total), width)
        if low < 1:
            raise FitError("the identity codec needs at least 1 bit per element; ask for a larger cache")
        bits = torch.full((width,), min(low, 8))
        if low < 8:
            bits[:extra] += 1
        codec = IdentityCodec(torch.argsort(bits, descending=True, stable=True))
        groups = groups_of(bits)
        quantizer = fit_quantizer(groups, codec.encode(stats[block].sample))
        yield FittedBlock(Block(codec=options.codec, slots=block, groups=groups), codec, quantizer)
