"""A layer's compressed past of any shape and length, with random codes and codecs: no model is run."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvcar.bundle import Bundle, CodedBlock, FitProvenance, ModelIdentity
from kvcar.cache.coder import PageCoder
from kvcar.cache.pages import PageStore
from kvcar.codecs.linear import LinearCodec
from kvcar.codecs.quantizer import StaticQuantizer
from kvcar.errors import InputError
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


def random_plan(shape: Shape, tokens: int, block_heads: int, latents: int, bits: int) -> Plan:
    """A layer in blocks of ``block_heads`` neighbouring heads, each with ``latents`` latents of ``bits`` bits.

    Raises:
        InputError: heads that do not divide into such blocks, or more latents than a block is wide.
    """
    if shape.kv_heads % block_heads or not 0 < latents <= block_heads * shape.head_dim:
        raise InputError(
            f"{shape.kv_heads} heads of {shape.head_dim} cannot be coded in blocks of {block_heads} heads with {latents} latents"
        )
    geometry = KVGeometry(
        layers=1, kv_heads=shape.kv_heads, query_heads=shape.query_heads, head_dim=shape.head_dim, rotary=True,
        max_positions=tokens,
    )  # fmt: skip
    groups = (BitGroup(bits=bits, count=latents),)
    blocks = tuple(
        Block(codec="linear", slots=_slots(kind, first, block_heads), groups=groups)
        for kind in KINDS
        for first in range(0, shape.kv_heads, block_heads)
    )
    return Plan(geometry=geometry, blocks=blocks)


def _slots(kind: Kind, first: int, heads: int) -> tuple[Slot, ...]:
    return tuple(Slot(0, head, kind) for head in range(first, first + heads))


def random_bundle(plan: Plan) -> Bundle:
    """Random codecs for ``plan``, scaled so that what they decode is as large as keys are."""
    generator = torch.Generator().manual_seed(_SEED)
    coded = tuple(_random_block(block, plan.geometry.head_dim, generator) for block in plan.blocks)
    identity = ModelIdentity(name="random", architecture="none", dtype="float32", fingerprint="0" * 64)
    fit = FitProvenance(
        kvcar_version="0", torch_version="0", transformers_version="0", date="2000-01-01", text="none",
        text_sha256="0" * 64, tokens=1, context=1, seed=_SEED, options={},
    )  # fmt: skip
    return Bundle(plan, coded, Fingerprint(torch.zeros(0), "float32", "0" * 64), identity, fit)


def _random_block(block: Block, head_dim: int, generator: torch.Generator) -> CodedBlock:
    width, latents = len(block.slots) * head_dim, block.latents
    matrix = torch.randn(width, latents, generator=generator) / latents**0.5
    codec = LinearCodec(torch.zeros(width), matrix, matrix.T.contiguous())
    steps = 2.0 ** block.groups[0].bits - 1
    scale = torch.full((latents,), 4.0 / steps)
    return CodedBlock(codec, StaticQuantizer(block.groups, scale, torch.full((latents,), -2.0)))


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
        return self._batch * (pages * self.coder.layout.page_bytes + exact)

    def operations(self) -> int:
        """Count multiplications and additions of one step: keys decoded, values summed as latents."""
        geometry = self._plan.geometry
        tokens, heads, dim = self.coded_tokens, geometry.query_heads, geometry.head_dim
        decoded = sum(block.latents * len(block.slots) * dim for block in self._plan.blocks if block.kind == "key")
        summed = sum(
            block.latents * len(block.slots) * heads // geometry.kv_heads
            for block in self._plan.blocks
            if block.kind == "value"
        )
        exact = 2 * self.exact_tokens * heads * dim
        return 2 * self._batch * (tokens * (decoded + heads * dim + summed) + exact)

    def _store(self) -> PageStore:
        plan, page_bytes = self._plan, self.coder.layout.page_bytes
        store = PageStore(self.coder.units, page_bytes, plan.page_tokens)
        while store.allocated_pages * plan.page_tokens < self.coded_tokens:
            size = (self._batch, next_arena_pages(store.allocated_pages), page_bytes)
            store.arenas.append(torch.randint(0, 256, size, dtype=torch.uint8, device=self._device))
        store.tokens = self.coded_tokens
        return store


def _normal(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(size, dtype=dtype, device=device)
