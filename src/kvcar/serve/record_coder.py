"""A bundle made ready to write and read records: whole vectors to stored values and back, keys before and after RoPE."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
        if len(geometry.codable_layers) != geometry.layers:
            raise UnsupportedModelError(
                "records hold keys and values of all layers, but this model has sliding windows, states, or layers without a "
                "cache of their own; serve it without stored prefixes"
            )
        self.bundle, self.plan, self.geometry, self.dtype = bundle, bundle.plan, geometry, dtype
        self.device = torch.device(device)
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
        return self._turned(keys, position, RotaryTable.unrotate)

    def after_rope(self, keys: Tensor, position: int | None) -> Tensor:
        """Undo ``before_rope``."""
        return self._turned(keys, position, RotaryTable.rotate)

    def vectors(self, unit: UnitCoder, sides: Mapping[tuple[str, bool], Tensor]) -> Tensor:
        """The unit's slots side by side ``[1, T, W]``; ``sides`` by kind and whether before RoPE."""
        return unit.vectors(lambda slot, before: sides[slot.kind, before][slot.layer, slot.head][None])

    def decoded(self, unit: UnitCoder, stored: Tensor) -> Tensor:
        """Vectors ``[T, W]`` of stored values ``[T, S]``, keys before RoPE unless the unit is lossless."""
        affine = self._affine.get(id(unit))
        if unit.coded.codec is None or unit.coded.quantizer is None:
            return stored
        if affine is not None:
            return torch.addmm(affine[1], stored.float(), affine[0])
        return unit.coded.codec.decode(unit.coded.quantizer.latents(stored.float()))

    @cached_property
    def _affine(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Decoders that are one matrix, in float and with the quantiser's steps in them, made once."""
        found = {}
        for unit in self.pages.units:
            affine = unit.coded.codec.affine_decoder() if unit.coded.codec is not None else None
            folded = unit.coded.quantizer.folded(*affine) if affine and unit.coded.quantizer is not None else None
            if folded is not None:
                found[id(unit)] = folded
        return found

    def _turned(
        self, keys: Tensor, position: int | None, turn: Callable[[RotaryTable, Tensor, Tensor], Tensor]
    ) -> Tensor:
        out = keys.float()
        tables = {id(table): table for layer in range(len(keys)) if (table := self._rotary_of(layer)) is not None}
        if position is None or not tables:
            return out
        positions = torch.arange(position, position + keys.shape[2], device=keys.device)
        for key, table in tables.items():
            layers = [layer for layer in range(len(keys)) if id(self._rotary_of(layer)) == key]
            turned = turn(table, out[layers], positions[None].expand(len(layers), -1))
            out = turned if len(layers) == len(keys) else out.index_copy(0, torch.tensor(layers), turned)
        return out
