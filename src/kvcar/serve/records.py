"""Records of stored prefixes: the keys and values of 256 tokens that stand alone, as a bundle codes them, and back.

A record needs nothing but its bundle: no window, no neighbours, no engine. So any engine that shows keys, values and
positions can write one, and another one read it into its own pages.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from ..cache.coder import UnitCoder, UnitContents
from ..cache.finer import costs_too_much
from ..context.file import Part
from ..context.parts import decode_part, encode_part, is_sound
from ..errors import ContextError, InputError, require
from ..kernels.trellis import levels_of
from ..version import __version__
from .page_codes import decode_page, encode_page, parameter_bytes
from .record_coder import DTYPES, RecordCoder
from .record_file import PAGE_TOKENS, RecordHeader, RecordKey, RecordPart, put_together, take_apart

CODES, PARAMETERS, EXACT = "codes", "parameters", "exact"


class _Spec(NamedTuple):
    """What a reader knows of a part beforehand."""

    dtype: torch.dtype
    shape: tuple[int, ...]


@torch.no_grad()
def encode_record(coder: RecordCoder, keys: Tensor, values: Tensor, key: RecordKey) -> bytes:
    """Code the keys and values of one page.

    The sinks of the plan, and all tokens of a page that would cost more than the plan's ``max_page_cost``, are kept
    exactly.

    Args:
        coder: of the model's bundle.
        keys: after RoPE ``[L, H, T, D]``, of 1 to 256 tokens.
        values: the same shape.
        key: what the record is asked for by; sinks are the first tokens of position 0.

    Raises:
        InputError: other shapes, NaN, infinite values or numbers beyond 2^30, or the extra ``store`` is not installed.
    """
    tokens = _checked_tokens(coder, keys, values)
    keys, values = keys.to(coder.device, coder.dtype), values.to(coder.device, coder.dtype)
    exact = min(coder.plan.sinks, tokens) if key.position == 0 else 0
    units, costly = _coded(coder, keys, values, key.position, exact)
    exact = tokens if costly else exact
    named: dict[str, Tensor] = {}
    if exact < tokens:
        named = {f"raw.{index}": unit.raw[0] for index, unit in enumerate(units)}
        none = torch.empty(tokens - exact, 0, dtype=torch.float32)
        named[CODES] = torch.cat([unit.codes[0] for unit in units], dim=-1) if units else none
    named |= _exact_parts(coder, keys, values, exact)
    parts = [made for name, tensor in named.items() if tensor.numel() for made in _written(name, tensor.cpu(), coder)]
    geometry = coder.geometry
    header = RecordHeader(
        kvcar_version=__version__, model_fingerprint=coder.fingerprint, bundle_sha256=coder.bundle.digest,
        layers=geometry.layers, kv_heads=geometry.kv_heads, head_dim=geometry.head_dim, dtype=DTYPES[coder.dtype],
        chain=key.chain, position=key.position, tokens=tokens, exact=exact, parts=tuple(part for part, _ in parts),
    )  # fmt: skip
    return put_together(header, [data for _, data in parts])


@torch.no_grad()
def decode_record(coder: RecordCoder, data: bytes | memoryview, key: RecordKey) -> tuple[Tensor, Tensor]:
    """Read the keys (after RoPE) and values ``[L, H, T, D]`` of a page, in the coder's dtype and on its device.

    Raises:
        ContextError: the record is damaged, or of another version, model, bundle, dtype, text or position.
        InputError: the extra ``store`` is not installed.
    """
    header, payloads = check_record(coder, data, key)
    tensors = {part.name: _read(part, payloads, coder, header) for part in header.parts if part.name != PARAMETERS}
    keys, values = _empty(coder, header.tokens), _empty(coder, header.tokens)
    if header.exact < header.tokens:
        _decode_units(coder, header, tensors, keys, values)
    if EXACT in tensors:
        layers = list(coder.plan.coded_layers)
        keys[layers, :, : header.exact], values[layers, :, : header.exact] = (
            side.to(coder.device, coder.dtype) for side in tensors[EXACT].unbind(1)
        )
    for layer in coder.plain_layers:
        keys[layer], values[layer] = tensors[f"plain.{layer}"].to(coder.device)
    return keys, values


def check_record(
    coder: RecordCoder, data: bytes | memoryview, key: RecordKey
) -> tuple[RecordHeader, dict[str, memoryview]]:
    """Check all that can be told of a record without decoding it; return its header and the bytes of its parts.

    Raises:
        ContextError: as for ``decode_record``.
    """
    header, payloads = take_apart(data)
    geometry = coder.geometry
    found = (
        header.model_fingerprint,
        header.bundle_sha256,
        header.layers,
        header.kv_heads,
        header.head_dim,
        header.dtype,
    )
    wanted = (
        coder.fingerprint, coder.bundle.digest, geometry.layers, geometry.kv_heads, geometry.head_dim, DTYPES[coder.dtype],
    )  # fmt: skip
    if found != wanted:
        raise ContextError(
            f"the record is of another model, bundle or dtype ({header.bundle_sha256[:12]}..., {header.dtype}) than this "
            f"one ({coder.bundle.digest[:12]}..., {DTYPES[coder.dtype]}); it is of no use here"
        )
    if (header.chain, header.position) != key:
        raise ContextError("the record is of another text, or of another place in it; it is of no use here")
    specs = _specs(coder, header)
    differing = [part.name for part in header.parts if not _fits(part, specs.get(part.name))]
    missing = specs.keys() - payloads.keys() - {PARAMETERS}
    if differing or missing or _is_paged(header) != (PARAMETERS in payloads):
        raise ContextError(
            f"the record's parts {sorted({*differing, *missing})[:5]} are not those of its bundle; write it again"
        )
    return header, payloads


def _checked_tokens(coder: RecordCoder, keys: Tensor, values: Tensor) -> int:
    require(Tensor, keys=keys, values=values)
    geometry = coder.geometry
    wanted = (geometry.layers, geometry.kv_heads, keys.shape[2] if keys.ndim == 4 else 0, geometry.head_dim)
    if tuple(keys.shape) != wanted or tuple(values.shape) != wanted or not 1 <= wanted[2] <= PAGE_TOKENS:
        raise InputError(
            f"keys and values have shapes {tuple(keys.shape)} and {tuple(values.shape)}; a record of this model takes "
            f"({geometry.layers}, {geometry.kv_heads}, 1 to {PAGE_TOKENS}, {geometry.head_dim}) each"
        )
    if not (torch.isfinite(keys).all() and torch.isfinite(values).all() and is_sound(keys) and is_sound(values)):
        raise InputError("keys or values hold NaN, infinite values or numbers beyond 2^30, which no record holds")
    return wanted[2]


def _coded(
    coder: RecordCoder, keys: Tensor, values: Tensor, position: int | None, exact: int
) -> tuple[list[UnitContents], bool]:
    """Stored values of all units, of tokens from ``exact`` on, and whether reading them would cost more than the plan allows."""
    sides = {
        ("key", True): coder.before_rope(keys, position), ("key", False): keys,
        ("value", True): values, ("value", False): values,
    }  # fmt: skip
    limit, contents = coder.plan.cache.page_cost_limit, []
    cost = torch.zeros(keys.shape[-2] - exact, device=keys.device, dtype=torch.float32)
    for unit in coder.pages.units:
        x = coder.vectors(unit, sides)[:, exact:]
        stored = unit.stored(x)
        contents.append(_contents(unit, stored))
        if limit is not None and unit.knows_cost:
            error = x.float()[0] - coder.decoded(unit, stored[0])
            cost = cost + unit.coded.cost(error, len(error)) if len(error) else cost
    costly = limit is not None and len(cost) > 0 and bool(costs_too_much(cost.mean(), cost.max(), limit))
    return contents, costly


def _contents(unit: UnitCoder, stored: Tensor) -> UnitContents:
    """Stored values ``[1, T, S]`` in dtypes as narrow as what they hold."""
    segment = unit.unit.segment
    if segment.lossless:
        return UnitContents(
            stored, torch.empty(*stored.shape[:2], 0, dtype=torch.uint8, device=stored.device), stored[..., :0]
        )
    raw, codes = unit.parts_of(stored)
    # A record's pages are not the cache's, and have no mean errors.
    return UnitContents(raw, codes, codes[..., :0])


def _exact_parts(coder: RecordCoder, keys: Tensor, values: Tensor, exact: int) -> dict[str, Tensor]:
    """First tokens of coded layers ``[l, 2, H, exact, D]``, and all tokens ``[2, H, T, D]`` of the others."""
    both = torch.stack([keys, values], dim=1)
    named = {f"plain.{layer}": both[layer] for layer in coder.plain_layers}
    return {EXACT: both[list(coder.plan.coded_layers), :, :, :exact].to(coder.pages.dtype), **named}


def _written(name: str, tensor: Tensor, coder: RecordCoder) -> list[tuple[RecordPart, bytes]]:
    """What the header says of a tensor, and its bytes; two parts where codes come with their parameters."""
    if name != CODES:
        return [_zstd(name, tensor)]
    parameters, data = encode_page(tensor.numpy(), coder.bits)
    parts = [_zstd(PARAMETERS, torch.from_numpy(parameters)), (_part_of_codes(tensor, len(data)), data)]
    packed = _zstd(CODES, tensor)
    # Codes that nothing is known of, such as those of noise, gain nothing by tables.
    return [packed] if len(packed[1]) <= sum(len(each) for _, each in parts) else parts


def _zstd(name: str, tensor: Tensor) -> tuple[RecordPart, bytes]:
    # Under a name that the context's own coder of codes does not claim.
    part, data = encode_part(name + "." if name == CODES else name, tensor.contiguous(), ())
    return RecordPart(**{**part.model_dump(), "name": name, "size": len(data)}), data


def _part_of_codes(tensor: Tensor, size: int) -> RecordPart:
    return RecordPart(
        name=CODES, coding="page", dtype="uint8", shape=tuple(tensor.shape), size=size, sha256=_sha256(tensor)
    )


def _sha256(codes: Tensor) -> str:
    return hashlib.sha256(codes.contiguous().numpy().data).hexdigest()


# Reading


def _is_paged(header: RecordHeader) -> bool:
    """Whether the codes come with parameters."""
    return any(part.coding == "page" for part in header.parts)


def _specs(coder: RecordCoder, header: RecordHeader) -> dict[str, _Spec]:
    """What the parts of a record of this coder are, by name; parts without elements are left out."""
    geometry, coded = coder.geometry, header.tokens - header.exact
    rows = (2, geometry.kv_heads)
    specs = {
        CODES: _Spec(torch.uint8, (coded, len(coder.bits))),
        PARAMETERS: _Spec(torch.uint8, (parameter_bytes(len(coder.bits)) if coded and coder.bits else 0,)),
        EXACT: _Spec(coder.pages.dtype, (len(coder.plan.coded_layers), *rows, header.exact, geometry.head_dim)),
    }
    for layer in coder.plain_layers:
        specs[f"plain.{layer}"] = _Spec(coder.dtype, (*rows, header.tokens, geometry.head_dim))
    for index, unit in enumerate(coder.pages.units):
        segment = unit.unit.segment
        width, dtype = (segment.latents, unit.exact_dtype) if segment.lossless else (segment.raw, torch.float16)
        specs[f"raw.{index}"] = _Spec(dtype, (coded, width))
    return {name: spec for name, spec in specs.items() if prod(spec.shape)}


def _fits(part: RecordPart, spec: _Spec | None) -> bool:
    codings = ("page", "zstd") if part.name == CODES else ("zstd",)
    return spec is not None and part.coding in codings and (getattr(torch, part.dtype), part.shape) == spec


def _read(part: RecordPart, payloads: Mapping[str, memoryview], coder: RecordCoder, header: RecordHeader) -> Tensor:
    """Decode the tensor of a part; raises ContextError where it is not the one that was written."""
    if part.coding == "zstd":
        return _unpacked(part, payloads[part.name])
    said = next(each for each in header.parts if each.name == PARAMETERS)
    parameters = _unpacked(said, payloads[PARAMETERS]).numpy()
    codes = torch.from_numpy(decode_page(parameters, payloads[CODES], part.shape[0], coder.bits))
    if _sha256(codes) != part.sha256:
        raise ContextError("the record's codes do not decode to what was written; write it again")
    return codes


def _unpacked(part: RecordPart, data: memoryview) -> Tensor:
    own = Part(name=part.name + ".", coding="zstd", dtype=part.dtype, shape=part.shape, sha256=part.sha256)
    tensor = decode_part(own, data, ())
    if not is_sound(tensor):
        raise ContextError("the record holds NaN, infinite values or numbers beyond 2^30; write it again")
    return tensor


def _decode_units(
    coder: RecordCoder, header: RecordHeader, tensors: Mapping[str, Tensor], keys: Tensor, values: Tensor
) -> None:
    """Fill in what the units of a page hold of all layers, behind the tokens that are kept exactly."""
    position = None if header.position is None else header.position + header.exact
    before, after = torch.zeros_like(keys[:, :, header.exact :], dtype=torch.float32), {}
    sources = coder.sources
    for index, unit in enumerate(coder.pages.units):
        vectors = coder.decoded(unit, _stored(coder, index, tensors)).split(coder.geometry.head_dim, dim=-1)
        lossless = unit.coded.codec is None
        for slot, vector in zip(unit.unit.slots, vectors, strict=True):
            for own in sources[slot]:
                if own.kind == "value":
                    values[own.layer, own.head, header.exact :] = vector
                elif lossless:
                    after[own] = vector
                else:
                    before[own.layer, own.head] = vector
    keys[:, :, header.exact :] = coder.after_rope(before, position)
    for slot, vector in after.items():
        keys[slot.layer, slot.head, header.exact :] = vector


def _stored(coder: RecordCoder, index: int, tensors: Mapping[str, Tensor]) -> Tensor:
    """Stored values ``[T, S]`` of a unit, its columns taken out of the codes."""
    parts = []
    if f"raw.{index}" in tensors:
        parts.append(tensors[f"raw.{index}"].to(coder.device))
    columns = coder.columns[index]
    if columns.stop > columns.start:
        segment = coder.pages.units[index].unit.segment
        codes = tensors[CODES][:, columns].to(coder.device)
        parts.append(levels_of(codes, segment.branched - segment.raw, segment.page_tokens).float())
    return parts[0] if len(parts) == 1 else torch.cat([part.float() for part in parts], dim=-1)


def _empty(coder: RecordCoder, tokens: int) -> Tensor:
    geometry = coder.geometry
    shape = (geometry.layers, geometry.kv_heads, tokens, geometry.head_dim)
    return torch.zeros(shape, dtype=coder.dtype, device=coder.device)
