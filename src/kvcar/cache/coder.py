"""A bundle made ready for one device and dtype: encodes tokens into pages and tells attention how to read them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..bundle import Bundle, CodedBlock
from ..codecs import Codec
from ..geometry import Kind, Slot
from ..kernels.attend import Reader, RoundedDecoder
from ..kernels.encode import AffineEncoder, Writer, encode_pages
from ..kernels.pack import pack, unpack
from ..kernels.page_means import PageMeans, pack_means, unpack_means
from ..kernels.rotary import RotaryTable
from ..kernels.trellis import levels_of, stored_codes
from ..layout import PageLayout, PageUnit, page_layouts

Restore = Callable[[Tensor], Tensor]
Fetch = Callable[[Slot, bool], Tensor]
"""(slot, before RoPE) -> that slot's vectors of the tokens to encode, ``[B, N, D]``."""


@dataclass(frozen=True, eq=False)
class UnitContents:
    """Stored values of one unit of the pages.

    Attributes:
        raw: what is no integer code: float16 ``[B, N, raw]`` of a coded unit (dynamic scales, 16-bit latents), or all
            of a lossless one, ``[B, N, W]`` in the exact dtype.
        codes: uint8 ``[B, N, R - raw]``; of a lossless unit without columns.
        means: of the pages that they lie in, as they are stored, uint8 ``[B, pages, size]``; without columns where none are.
    """

    raw: Tensor
    codes: Tensor
    means: Tensor


def exact_dtype(bundle: Bundle, model_dtype: torch.dtype) -> torch.dtype:
    """Dtype of what the plan keeps exactly."""
    named = {"model": model_dtype, "bfloat16": torch.bfloat16, "float16": torch.float16}[bundle.plan.exact_dtype]
    # A 16-bit model's own dtype loses nothing and costs the same.
    return model_dtype if model_dtype.itemsize == named.itemsize else named


class CodedPages(NamedTuple):
    """What became of vectors that fill pages.

    Attributes:
        data: bytes of the segment uint8 ``[B, pages, size]``.
        means: bytes of what their errors have in common, ``[B, pages, size]``; None where none are stored.
        cost: of what is left, nats ``[B, N]``; None where it was not asked for, or the codec does not know.
    """

    data: Tensor
    means: Tensor | None
    cost: Tensor | None


@dataclass(frozen=True)
class UnitCoder:
    """One unit of a page with its codec on the right device; codec None means lossless."""

    unit: PageUnit
    coded: CodedBlock
    exact_dtype: torch.dtype

    def vectors(self, fetch: Fetch) -> Tensor:
        """The unit's slots side by side ``[B, N, W]``, keys before RoPE unless they are stored exactly."""
        lossless = self.coded.codec is None
        return torch.cat([fetch(slot, not lossless) for slot in self.unit.slots], dim=-1)

    def stored(self, x: Tensor, before: Tensor | None = None) -> Tensor:
        """Stored values ``[B, N, R]`` of vectors: float32, or the exact dtype when lossless.

        ``before`` ``[B, n, R]`` are those of the tokens before them in their page; None where they begin one.
        """
        if self.coded.codec is None or self.coded.quantizer is None:
            return x.to(self.exact_dtype)
        return self.coded.quantizer.codes(self.coded.codec.encode(x.float()), before)

    def whole_pages(self, x: Tensor, there: Tensor, with_cost: bool = False) -> CodedPages:
        """Code vectors ``[B, N, W]`` that fill pages; tokens that are not ``there``, bool ``[B, N]``, are never read."""
        data, means, cost = self.packed(x), None, None
        wanted = with_cost and self.knows_cost
        if wanted or self.mean_scale is not None:
            error = self.coded.error(x.float(), self.unpacked(data))
            if self.mean_scale is not None:
                means, read = self.means_of(error, there)
                error = error - read
            cost = self.coded.cost(error, self.unit.segment.page_tokens) if wanted else None
        return CodedPages(data, means, cost)

    @property
    def knows_cost(self) -> bool:
        """Whether the codec knows what its errors cost."""
        return self.coded.codec is not None and self.coded.codec.knows_cost

    def means_of(self, error: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
        """What the errors ``[B, N, W]`` of whole pages have in common, over tokens that are ``there``, bool ``[B, N]``.

        Returns:
            Bytes uint8 ``[B, pages, size]``, and what they are read as, float32 ``[B, N, W]``.
        """
        assert self.mean_scale is not None
        page_tokens = self.unit.segment.page_tokens
        weight = there.float().unflatten(1, (-1, page_tokens))
        weight = weight / weight.sum(-1, keepdim=True).clamp_min(1)
        mean = torch.einsum("bpn,bpnw->bpw", weight, error.unflatten(1, (-1, page_tokens)))
        data = pack_means(mean / self.mean_scale)
        return data, self.read_means(data).repeat_interleave(page_tokens, dim=1)

    def read_means(self, data: Tensor) -> Tensor:
        """Mean errors float32 ``[..., W]`` of bytes ``[..., size]``."""
        assert self.mean_scale is not None
        return unpack_means(data, len(self.mean_scale)) * self.mean_scale

    @cached_property
    def mean_scale(self) -> Tensor | None:
        """Scale of every element of the mean errors that its pages store, ``[W]``; None where they store none."""
        return None if self.unit.means is None or self.coded.codec is None else self.coded.codec.mean_scale()

    def unpacked(self, packed: Tensor) -> Tensor:
        """Stored values ``[B, N, R]`` of ``packed``."""
        return unpack(packed, self.unit.segment).reshape(packed.shape[0], -1, self.unit.segment.latents)

    def pack(self, stored: Tensor) -> Tensor:
        """Bytes uint8 ``[B, pages, size]`` of stored values ``[B, pages, page_tokens, R]``."""
        if self.unit.segment.lossless:
            return stored.to(self.exact_dtype).contiguous().view(torch.uint8).flatten(2)
        return pack(stored, self.unit.segment)

    def packed(self, x: Tensor) -> Tensor:
        """Bytes uint8 ``[B, pages, size]`` of tokens that fill whole pages: ``stored`` and ``pack`` as one operation."""
        return encode_pages(x, self.writer)

    @cached_property
    def writer(self) -> Writer:
        """How vectors of this unit become its segment, for ``kernels.encode``."""
        codec, quantizer, segment = self.coded.codec, self.coded.quantizer, self.unit.segment
        if codec is None or quantizer is None:
            return Writer(segment, None, None, None, self.exact_dtype)
        encoder, steps = codec.affine_encoder(), quantizer.steps()
        affine = AffineEncoder(*encoder, *steps) if encoder and steps else None
        return Writer(segment, codec.encode, quantizer.codes, affine, self.exact_dtype, steps)

    def contents(self, pages: Tensor) -> UnitContents:
        """Stored values, unpacked but in no wider dtype, of ``pages`` uint8 ``[B, pages, page_bytes]``."""
        segment, batch, means = self.unit.segment, pages.shape[0], self.unit.means
        data = pages[..., segment.offset : segment.end]
        if segment.lossless:
            values = data.contiguous().view(self.exact_dtype).reshape(batch, -1, segment.latents)
            none = torch.empty(*values.shape[:2], 0, dtype=torch.uint8, device=pages.device)
            return UnitContents(values, none, pages[..., :0])
        raw, codes = self.parts_of(unpack(data, segment).reshape(batch, -1, segment.latents))
        return UnitContents(raw, codes, pages[..., :0] if means is None else pages[..., means.offset : means.end])

    def stored_of(self, contents: UnitContents) -> Tensor:
        """Stored values ``[B, N, R]`` that ``pack`` takes, of what ``contents`` gave."""
        if self.unit.segment.lossless:
            return contents.raw
        segment = self.unit.segment
        levels = levels_of(contents.codes, segment.branched - segment.raw, segment.page_tokens)
        return torch.cat([contents.raw.float(), levels.float()], dim=-1)

    def parts_of(self, stored: Tensor) -> tuple[Tensor, Tensor]:
        """Stored values ``[B, N, R]`` of a coded unit, from a page's first token on, as ``UnitContents`` has them."""
        segment = self.unit.segment
        codes = stored_codes(stored[..., segment.raw :].to(torch.uint8), segment.branched - segment.raw)
        return stored[..., : segment.raw].to(torch.float16), codes

    def reader(self, slots: tuple[Slot, ...], heads: tuple[int, ...], head_dim: int) -> Reader:
        """Reader that gives ``heads`` of a layer from ``slots`` of this unit."""
        places = [self.unit.slots.index(slot) for slot in slots]
        columns = torch.cat([torch.arange(p * head_dim, (p + 1) * head_dim) for p in places])
        means = self._means_of(_as_slice(columns))
        if self._rounded is not None:
            own = _of_slots(self._rounded, _as_slice(torch.tensor(places)), _as_slice(columns))
            decode = partial(_decode_rounded, own, self.unit.segment.latents)
            return Reader(self.unit.segment, heads, None, decode, None, False, self.exact_dtype, own, means)
        restore, affine, decode = None, None, partial(_select, columns=_as_slice(columns))
        if self.coded.codec is not None:
            restore, affine = self._affine_of(_as_slice(columns))
            decode = partial(_affine, affine) if affine else partial(_decode, self.coded.codec, _as_slice(columns))
        lossless = self.coded.codec is None
        return Reader(self.unit.segment, heads, restore, decode, affine, lossless, self.exact_dtype, means=means)

    def _means_of(self, columns: slice | Tensor) -> PageMeans | None:
        if self.unit.means is None or self.mean_scale is None:
            return None
        return PageMeans(self.unit.means, columns, self.mean_scale[columns])

    @cached_property
    def _rounded(self) -> RoundedDecoder | None:
        """The decoder of codes as it lies in memory in 8 bits, where codes are latents but for a shift."""
        if self.coded.codec is None or self.coded.quantizer is None:
            return None
        decoder, steps = self.coded.codec.rounded_decoder(), self.coded.quantizer.steps()
        if decoder is None or steps is None or not bool((steps[0] == 1).all()):
            return None
        return replace(decoder, bias=self.coded.codec.decode(steps[1]))

    @cached_property
    def _restore_and_affine(self) -> tuple[Restore | None, tuple[Tensor, Tensor] | None]:
        """What turns stored values into decodable ones, and the decoder after it where it is affine.

        A static quantiser folds into an affine decoder, so that nothing is left to restore.
        """
        assert self.coded.codec is not None
        assert self.coded.quantizer is not None
        affine = self.coded.codec.affine_decoder()
        folded = self.coded.quantizer.folded(*affine) if affine else None
        return (None, folded) if folded else (self.coded.quantizer.latents, affine)

    def _affine_of(self, columns: slice | Tensor) -> tuple[Restore | None, tuple[Tensor, Tensor] | None]:
        restore, affine = self._restore_and_affine
        return restore, None if affine is None else (affine[0][:, columns], affine[1][columns])


class Host(Protocol):
    """An attached model, as its caches see it."""

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        ...

    def check_bundle(self, bundle: Bundle) -> None:
        """Refuse a bundle of another model."""
        ...

    def coder(self, bundle: Bundle) -> PageCoder:
        """Give the bundle made ready for the model's device and dtype."""
        ...

    def own_layers(self) -> list[Any]:
        """Make the layers of the model's own cache, empty."""
        ...

    def rotary(self, layer: int) -> RotaryTable | None:
        """Say how a layer rotates its keys; None where it does not."""
        ...


class PageCoder:
    """All units of a bundle's pages.

    Args:
        bundle: what to run.
        device: where pages live.
        dtype: what the model computes in.
    """

    def __init__(self, bundle: Bundle, device: torch.device, dtype: torch.dtype) -> None:
        self.plan = bundle.plan
        self.device = device
        self.dtype = exact_dtype(bundle, dtype)
        self.layouts = page_layouts(self.plan, self.dtype.itemsize)
        self.units = tuple(self._unit(bundle, unit, device) for layout in self.layouts for unit in layout.units)
        self.groups = _groups(self.layouts)
        self._readers = {
            (layer, kind): self._layer_readers(layer, kind)
            for layer in self.plan.coded_layers
            for kind in ("key", "value")
        }

    def readers(self, layer: int, kind: Kind) -> tuple[Reader, ...]:
        """Readers that together give every KV head of a coded layer once."""
        return self._readers[layer, kind]

    def codec_bytes(self) -> int:
        """Count the bytes of codecs as they lie in memory: what several share once, and all that kernels made of them."""
        tensors = [tensor for unit in self.units for tensor in unit.coded.tensors().values()]
        for readers in self._readers.values():
            for reader in readers:
                tensors += reader.tensors()
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        return sum(storages.values())

    def _unit(self, bundle: Bundle, unit: PageUnit, device: torch.device) -> UnitCoder:
        if unit.block is None:
            return UnitCoder(unit, CodedBlock(None, None), self.dtype)
        block = self.plan.blocks[unit.block]
        coded = bundle.blocks[unit.block].on(device, block, self.plan)
        return UnitCoder(unit, coded, self.dtype)

    def _layer_readers(self, layer: int, kind: Kind) -> tuple[Reader, ...]:
        owner = {slot: coder for coder in self.units for slot in coder.unit.slots}
        heads_of: dict[int, list[tuple[Slot, int]]] = {}
        coders: dict[int, UnitCoder] = {}
        for head in range(self.plan.geometry.kv_heads):
            source = self.plan.stored_source[Slot(layer, head, kind)]
            coder = owner[source]
            coders[id(coder)] = coder
            heads_of.setdefault(id(coder), []).append((source, head))
        readers = []
        for key, pairs in heads_of.items():
            slots, heads = zip(*pairs, strict=True)
            readers.append(coders[key].reader(slots, heads, self.plan.geometry.head_dim))
        return tuple(readers)


def _groups(layouts: tuple[PageLayout, ...]) -> tuple[tuple[PageLayout, tuple[int, ...]], ...]:
    """Each layout with the places of its units among those of all."""
    groups, start = [], 0
    for layout in layouts:
        groups.append((layout, tuple(range(start, start + len(layout.units)))))
        start += len(layout.units)
    return tuple(groups)


def _as_slice(columns: Tensor) -> slice | Tensor:
    """Neighbouring columns as a slice, which selects without a copy."""
    first, last = int(columns[0]), int(columns[-1])
    if torch.equal(columns, torch.arange(first, first + len(columns))):
        return slice(first, last + 1)
    return columns


def _of_slots(decoder: RoundedDecoder, slots: slice | Tensor, columns: slice | Tensor) -> RoundedDecoder:
    """The decoder of some slots of a block, in place where they are neighbours."""
    return RoundedDecoder(
        decoder.exact[:, columns], decoder.decoder[slots], decoder.scale[columns], decoder.bias[columns]
    )


def _decode_rounded(decoder: RoundedDecoder, latents: int, u: Tensor) -> Tensor:
    matrix, bias = decoder.affine(latents)
    return u @ matrix + bias


def _select(u: Tensor, columns: slice | Tensor) -> Tensor:
    return u[..., columns]


def _affine(affine: tuple[Tensor, Tensor], u: Tensor) -> Tensor:
    return u @ affine[0] + affine[1]


def _decode(codec: Codec, columns: slice | Tensor, z: Tensor) -> Tensor:
    return codec.decode(z)[..., columns]
