"""A layer's compressed past of any shape and length, with random codes and codecs, and bundles of such codecs for a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcar.bundle import Bundle, CodedBlock, FitProvenance, ModelIdentity, identify
from kvcar.cache.coder import PageCoder
from kvcar.cache.pages import PageStore
from kvcar.codecs import Codec, Linear8Codec, RoundedMetric
from kvcar.codecs.linear import LinearCodec
from kvcar.codecs.quantizer import StaticQuantizer, latent_bits
from kvcar.errors import InputError
from kvcar.fit.basis import FEWEST_EXACT_BITS, FEWEST_STRONG_BITS
from kvcar.fit.statistics import heads_of_metric
from kvcar.geometry import KINDS, Kind, KVGeometry, Slot
from kvcar.kernels.attend import ExactPast, PagedPast
from kvcar.kernels.rotary import RotaryTable
from kvcar.models.fingerprint import Fingerprint
from kvcar.plan import BitGroup, Block, Plan
from kvcar.sizes import next_arena_pages

_ROPE_BASE = 500_000.0
_SEED = 0


@dataclass(frozen=True)
class Shape:
    """Of one attention layer."""

    query_heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Of ``query heads,KV heads,head dim``; raises InputError."""
        try:
            query_heads, kv_heads, head_dim = (int(part) for part in text.split(","))
        except ValueError:
            raise InputError(f"a shape is query heads,KV heads,head dim, for example 32,8,128; got {text!r}") from None
        if min(query_heads, kv_heads, head_dim) < 1 or query_heads % kv_heads:
            raise InputError(f"query heads must be a multiple of KV heads, got {text}")
        return cls(query_heads, kv_heads, head_dim)


@dataclass(frozen=True)
class Codes:
    """How every layer is coded.

    Attributes:
        codec: linear or linear8.
        block_heads: neighbouring KV heads of a block.
        groups: latents of a block by bits: of keys and of values, or one for a block of both.
    """

    codec: str
    block_heads: int
    groups: tuple[tuple[BitGroup, ...], ...]

    @classmethod
    def of(cls, codec: str, block_heads: int, *latents: Mapping[int, int]) -> Codes:
        """Of latents by bits."""
        groups = (
            tuple(BitGroup(bits=bits, count=own[bits]) for bits in sorted(own, reverse=True) if own[bits])
            for own in latents
        )
        return cls(codec, block_heads, tuple(groups))


def random_plan(shape: Shape, tokens: int, block_heads: int, latents: int, bits: int) -> Plan:
    """A layer in blocks of ``block_heads`` neighbouring heads, each with ``latents`` latents of ``bits`` bits.

    Raises:
        InputError: see ``coded_plan``.
    """
    each = {bits: latents}
    return coded_plan(layer_geometry(shape, tokens), Codes.of("linear", block_heads, each, each))


def layer_geometry(shape: Shape, tokens: int) -> KVGeometry:
    """One layer's cache."""
    return KVGeometry(
        layers=1, kv_heads=shape.kv_heads, query_heads=shape.query_heads, head_dim=shape.head_dim, rotary=True,
        max_positions=tokens,
    )  # fmt: skip


def coded_plan(geometry: KVGeometry, codes: Codes) -> Plan:
    """Every layer in blocks of heads.

    Raises:
        InputError: heads that do not divide into such blocks, or more latents than a block is wide.
    """
    kinds: list[tuple[Kind, ...]] = [KINDS] if len(codes.groups) == 1 else [(kind,) for kind in KINDS]
    blocks = []
    for own, groups in zip(kinds, codes.groups, strict=True):
        latents, width = sum(group.count for group in groups), len(own) * codes.block_heads * geometry.head_dim
        if geometry.kv_heads % codes.block_heads or not 0 < latents <= width:
            raise InputError(
                f"{geometry.kv_heads} heads of {geometry.head_dim} cannot be coded in blocks of {codes.block_heads} heads with {latents} latents"
            )
        for layer in range(geometry.layers):
            for first in range(0, geometry.kv_heads, codes.block_heads):
                heads = range(first, first + codes.block_heads)
                slots = tuple(Slot(layer, head, kind) for kind in own for head in heads)
                blocks.append(Block(codec=codes.codec, slots=slots, groups=groups))
    return Plan(geometry=geometry, blocks=tuple(blocks))


def random_bundle(plan: Plan, model: PreTrainedModel | None = None) -> Bundle:
    """Random codecs for ``plan``, scaled so that what they decode is as large as keys are; for ``model`` where there is one."""
    generator = torch.Generator().manual_seed(_SEED)
    coded = tuple(_random_block(block, plan.geometry.head_dim, generator) for block in plan.blocks)
    if model is None:
        print_ = Fingerprint(torch.zeros(0), "float32", "0" * 64)
        identity = ModelIdentity(name="random", architecture="none", dtype="float32", fingerprint="0" * 64)
    else:
        print_, identity = identify(model, "random")
    fit = FitProvenance(
        kvcar_version="0", torch_version="0", transformers_version="0", date="2000-01-01", text="none",
        text_sha256="0" * 64, tokens=1, context=1, seed=_SEED, options={},
    )  # fmt: skip
    return Bundle(plan, coded, print_, identity, fit)


def _random_block(block: Block, head_dim: int, generator: torch.Generator) -> CodedBlock:
    make = {"linear": _random_linear, "linear8": _random_linear8}[block.codec]
    return CodedBlock(*make(block, head_dim, generator))


def _random_linear(block: Block, head_dim: int, generator: torch.Generator) -> tuple[Codec, StaticQuantizer]:
    width, latents = len(block.slots) * head_dim, block.latents
    matrix = torch.randn(width, latents, generator=generator) / latents**0.5
    scale = 4.0 / (2.0 ** latent_bits(block.groups) - 1)
    codec = LinearCodec(torch.zeros(width), matrix, matrix.T.contiguous())
    return codec, StaticQuantizer(block.groups, scale, torch.full((latents,), -2.0))


def _random_linear8(block: Block, head_dim: int, generator: torch.Generator) -> tuple[Codec, StaticQuantizer]:
    """As a fit rounds them; what errors cost is the same for all elements."""
    width, bits = len(block.slots) * head_dim, latent_bits(block.groups)
    exact, strong = (int((bits >= fewest).sum()) for fewest in (FEWEST_EXACT_BITS, FEWEST_STRONG_BITS))
    # A code of all values equally often has a variance of 4 ** bits / 12.
    matrix = torch.randn(len(bits), width, generator=generator) / (4.0**bits / 12 * len(bits)).sqrt()[:, None]
    side = min(heads_of_metric(head_dim), len({slot.head for slot in block.slots})) * head_dim
    metrics = [RoundedMetric(torch.eye(own)) for own in _parts(width, side)]
    codec = Linear8Codec.rounded(torch.zeros(width), matrix, metrics, head_dim, exact, strong)
    return codec, StaticQuantizer(block.groups, torch.ones(len(bits)), -(2.0**bits - 1) / 2)


def _parts(width: int, part: int) -> list[int]:
    return [min(part, width - first) for first in range(0, width, part)]


class RandomPast:
    """Makes pasts of ``tokens`` tokens for ``batch`` sequences; they share one coder, as a model's caches do.

    Sinks and window are exact and the rest lies in pages of random bytes, in arenas as a cache would have allocated
    them.

    Args:
        bundle: of ``random_bundle``.
        tokens: of each sequence, in all.
        batch: sequences.
        dtype: of queries and of what is exact.
        device: where everything lies.
    """

    def __init__(self, bundle: Bundle, tokens: int, batch: int, dtype: torch.dtype, device: torch.device) -> None:
        self._plan, self._batch, self._dtype, self._device = bundle.plan, batch, dtype, device
        self.coder = PageCoder(bundle, device, dtype)
        self.exact_tokens = self._plan.sinks + self._plan.window
        self.coded_tokens = tokens - self._plan.window
        if self.coded_tokens <= self._plan.sinks:
            raise InputError(f"{tokens} tokens leave nothing to code beside sinks and window")
        head_dim = self._plan.geometry.head_dim
        frequency = _ROPE_BASE ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim)
        self._rotary = RotaryTable(frequency, 1.0, "half")

    def query(self) -> Tensor:
        """A decode step's queries ``[B, Hq, 1, D]``."""
        geometry = self._plan.geometry
        return _normal((self._batch, geometry.query_heads, 1, geometry.head_dim), self._dtype, self._device)

    def past(self) -> tuple[ExactPast, PagedPast]:
        """A new random past."""
        geometry, sinks = self._plan.geometry, self._plan.sinks
        size = (self._batch, geometry.kv_heads, self.exact_tokens, geometry.head_dim)
        exact = ExactPast(_normal(size, self._dtype, self._device), _normal(size, self._dtype, self._device), None)
        zeros = torch.zeros(self._batch, dtype=torch.int64, device=self._device)
        paged = PagedPast(
            tiles=self._store().arenas,
            tokens=self.coded_tokens,
            first=zeros + sinks,
            largest_first=sinks,
            offset=zeros,
            key_readers=self.coder.readers(0, "key"),
            value_readers=self.coder.readers(0, "value"),
            rotary=self._rotary,
        )
        return exact, paged

    def bytes_read(self) -> int:
        """Bytes of codes and of what is exact that one step must read."""
        pages = -(-self.coded_tokens // self._plan.page_tokens)
        exact = self.exact_tokens * self._plan.geometry.layer_elements_per_token * self._dtype.itemsize
        return self._batch * (pages * self.coder.layouts[0].page_bytes + exact)

    def operations(self) -> int:
        """Count multiplications and additions of one step: keys decoded, values summed as latents."""
        geometry = self._plan.geometry
        tokens, heads, dim = self.coded_tokens, geometry.query_heads, geometry.head_dim
        slots = {kind: [(b.latents, sum(s.kind == kind for s in b.slots)) for b in self._plan.blocks] for kind in KINDS}
        decoded = sum(latents * count * dim for latents, count in slots["key"])
        summed = sum(latents * count * heads // geometry.kv_heads for latents, count in slots["value"])
        exact = 2 * self.exact_tokens * heads * dim
        return 2 * self._batch * (tokens * (decoded + heads * dim + summed) + exact)

    def _store(self) -> PageStore:
        plan, page_bytes = self._plan, self.coder.layouts[0].page_bytes
        store = PageStore(self.coder.units, page_bytes, plan.page_tokens)
        while store.allocated_pages * plan.page_tokens < self.coded_tokens:
            size = (self._batch, next_arena_pages(store.allocated_pages), page_bytes)
            store.arenas.append(torch.randint(0, 256, size, dtype=torch.uint8, device=self._device))
        store.tokens = self.coded_tokens
        return store


def _normal(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(size, dtype=dtype, device=device)
