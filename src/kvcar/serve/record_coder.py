"""A bundle made ready to write and read records: whole vectors to stored values and back, keys before and after RoPE."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..bundle import Bundle
from ..cache.coder import PageCoder, UnitCoder
from ..context.file import DtypeName
from ..context.parts import code_bits
from ..errors import InputError, UnsupportedModelError, require
from ..geometry import Slot
from ..kernels.rotary import RotaryTable
from .record_file import PAGE_TOKENS

DTYPES: dict[torch.dtype, DtypeName] = {
    torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32",
}  # fmt: skip

RotaryOf = Callable[[int], RotaryTable | None]


class RecordCoder:
    """A bundle made ready to write and read records.

    Args:
        bundle: of the model.
        rotary_of: how a layer rotates its keys (``learn_rotations(...).get``); None where it does not.
        dtype: of the model's keys and values: float32, bfloat16 or float16.
        device: where coding is done; keys and values may come from elsewhere.

    Raises:
        UnsupportedModelError: layers of the model do not keep all of the past, or not of the same shape.
        InputError: another dtype.
    """

    def __init__(
        self, bundle: Bundle, rotary_of: RotaryOf, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        require(Bundle, bundle=bundle)
        if dtype not in DTYPES:
            raise InputError(f"records hold keys and values of float32, bfloat16 or float16, got {dtype}")
        geometry = bundle.plan.geometry
        if len(geometry.codable_layers) != geometry.layers or geometry.windowed_layers:
            raise UnsupportedModelError(
                "records hold keys and values of all layers, but this model has sliding windows, states, or layers without a "
                "cache of their own; serve it without stored prefixes"
            )
        self.bundle, self.plan, self.geometry, self.dtype = bundle, bundle.plan, geometry, dtype
        self.device = torch.device(device) if isinstance(device, str) else device
        self.pages = PageCoder(bundle, self.device, dtype)
        self.bits = code_bits(self.plan)
        self.plain_layers = tuple(sorted(set(range(geometry.layers)) - set(self.plan.coded_layers)))
        self._rotary_of = rotary_of

    @property
    def fingerprint(self) -> str:
        """Of the model that the bundle was fitted for."""
        return self.bundle.model.fingerprint

    @property
    def bf16_bytes(self) -> int:
        """Bytes of one token in the model's own cache in bfloat16."""
        return self.geometry.full_bytes(1)

    @property
    def largest_bytes(self) -> int:
        """More bytes than any record takes: what a reader takes from a file at most, and a writer of fixed sizes reserves."""
        elements = PAGE_TOKENS * self.geometry.layers * self.geometry.layer_elements_per_token
        return 2 * elements * self.dtype.itemsize + 8 * PAGE_TOKENS * len(self.bits) + (1 << 20)

    @cached_property
    def sources(self) -> dict[Slot, list[Slot]]:
        """For every stored slot those that read it, itself included."""
        readers: dict[Slot, list[Slot]] = {}
        for slot, source in self.plan.stored_source.items():
            readers.setdefault(source, []).append(slot)
        return readers

    @cached_property
    def columns(self) -> list[slice]:
        """For every unit the columns of the codes that are its own."""
        found, start = [], 0
        for unit in self.pages.units:
            segment = unit.unit.segment
            width = 0 if segment.lossless else segment.latents - segment.raw
            found.append(slice(start, start + width))
            start += width
        return found

    def before_rope(self, keys: Tensor, position: int | None) -> Tensor:
        """Keys ``[L, H, T, D]`` float32 as they were before RoPE; as they are where the position is None."""
        return keys.float() if position is None else self.before_rope_at(keys, _positions(keys, position))

    def before_rope_at(self, keys: Tensor, positions: Tensor) -> Tensor:
        """Keys ``[L, H, T, D]`` float32 as they were before RoPE at int64 ``positions`` ``[T]``."""
        return self._turned(keys, positions, RotaryTable.unrotate)

    def after_rope(self, keys: Tensor, position: int | None) -> Tensor:
        """Undo ``before_rope``."""
        return keys.float() if position is None else self._turned(keys, _positions(keys, position), RotaryTable.rotate)

    @cached_property
    def key_means(self) -> tuple[Tensor, Tensor] | None:
        """Mean keys before RoPE that the codecs know, float32 ``[L, H, D]``, and what each element counts; None for none."""
        geometry = self.geometry
        means = torch.zeros(geometry.layers, geometry.kv_heads, geometry.head_dim, device=self.device)
        weight = torch.zeros_like(means)
        for unit in self.pages.units:
            codec = unit.coded.codec
            if codec is None or unit.coded.quantizer is None:
                continue
            latents = unit.unit.segment.latents - self.plan.blocks[unit.unit.block or 0].scale_latents
            decoded = codec.decode(torch.zeros(latents, device=self.device)).split(geometry.head_dim)
            for slot, mean in zip(unit.unit.slots, decoded, strict=True):
                if slot.kind == "key" and self._rotary_of(slot.layer) is not None:
                    means[slot.layer, slot.head] = mean
                    weight[slot.layer, slot.head] = 1 / mean.square().mean().clamp_min(1e-12)
        return (means, weight) if bool(means.any()) else None

    def vectors(self, unit: UnitCoder, sides: Mapping[tuple[str, bool], Tensor]) -> Tensor:
        """The unit's slots side by side ``[1, T, W]``; ``sides`` by kind and whether before RoPE."""
        return unit.vectors(lambda slot, before: sides[slot.kind, before][slot.layer, slot.head][None])

    def decoded(self, unit: UnitCoder, stored: Tensor) -> Tensor:
        """Vectors ``[T, W]`` of stored values ``[T, S]``, keys before RoPE unless the unit is lossless."""
        if unit.coded.codec is None or unit.coded.quantizer is None:
            return stored
        whole = self._whole.get(id(unit))
        if whole is not None:
            return whole(stored)
        affine = self._affine.get(id(unit))
        if affine is not None:
            return torch.addmm(affine[1], stored.float(), affine[0])
        return unit.coded.codec.decode(unit.coded.quantizer.latents(stored.float()))

    @cached_property
    def _whole(self) -> dict[int, WholeNumberDecoder]:
        """Decoders in 8 bits, on CPUs."""
        if self.device.type != "cpu":
            return {}
        return {id(unit): made for unit in self.pages.units if (made := WholeNumberDecoder.of(unit)) is not None}

    @cached_property
    def _affine(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Other decoders that are one matrix, in float and with the quantiser's steps in them, made once."""
        found = {}
        for unit in self.pages.units:
            if id(unit) in self._whole or unit.coded.codec is None or unit.coded.quantizer is None:
                continue
            affine = unit.coded.codec.affine_decoder()
            folded = unit.coded.quantizer.folded(*affine) if affine else None
            if folded is not None:
                found[id(unit)] = folded
        return found

    def _turned(self, keys: Tensor, positions: Tensor, turn: Callable[[RotaryTable, Tensor, Tensor], Tensor]) -> Tensor:
        out = keys.float()
        tables = {id(table): table for layer in range(len(keys)) if (table := self._rotary_of(layer)) is not None}
        for key, table in tables.items():
            layers = [layer for layer in range(len(keys)) if id(self._rotary_of(layer)) == key]
            turned = turn(table, out[layers], positions[None].expand(len(layers), -1))
            out = turned if len(layers) == len(keys) else out.index_copy(0, torch.tensor(layers), turned)
        return out


def _positions(keys: Tensor, first: int) -> Tensor:
    """Positions int64 ``[T]`` of keys ``[..., T, D]``."""
    return torch.arange(first, first + keys.shape[-2], device=keys.device)


@dataclass(frozen=True)
class WholeNumberDecoder:
    """A decoder in 8 bits as products of whole numbers: codes times codes, which CPUs do four times as fast as in float.

    Attributes:
        exact: float32 ``[E, W]``, of the first latents.
        decoder: int8 ``[n, W]``, of the others; ``n`` is a multiple of four.
        scale: float32 ``[W]``, of the decoder's columns.
        middle: float32 ``[n]``: what is taken off codes so that they fit in 8 bits with a sign.
        bias: float32 ``[W]``.
    """

    exact: Tensor
    decoder: Tensor
    scale: Tensor
    middle: Tensor
    bias: Tensor

    def __call__(self, codes: Tensor) -> Tensor:
        """Vectors float32 ``[T, W]`` of codes ``[T, R]``."""
        count = len(self.exact)
        others = torch.nn.functional.pad(codes[:, count:], (0, len(self.middle) - codes.shape[1] + count))
        products = torch._int_mm((others - self.middle).to(torch.int8), self.decoder)
        out = torch.addcmul(self.bias, products, self.scale)
        return out.addmm_(codes[:, :count].float(), self.exact) if count else out

    @classmethod
    def of(cls, unit: UnitCoder) -> WholeNumberDecoder | None:
        """Of a unit whose codes are latents but for a shift; None where they are not, or its decoder is not in 8 bits."""
        codec, quantizer = unit.coded.codec, unit.coded.quantizer
        rounded = codec.rounded_decoder() if codec is not None else None
        steps = quantizer.steps() if quantizer is not None else None
        if (
            codec is None
            or rounded is None
            or steps is None
            or not bool((steps[0] == 1).all())
            or unit.unit.segment.raw
        ):
            return None
        slots, groups, dim, together = rounded.decoder.shape
        decoder = rounded.decoder.permute(1, 3, 0, 2).reshape(groups * together, slots * dim).contiguous()
        count, middle = len(rounded.exact), torch.zeros(len(decoder))
        middle[: unit.unit.segment.latents - count] = 128.0
        shifted = steps[1].clone()
        shifted[count:] += 128.0
        return cls(rounded.exact.float(), decoder, rounded.scale, middle, codec.decode(shifted))
