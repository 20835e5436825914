"""A cache's contents as the named tensors of a stored context, and those as bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from ..cache.coder import PageCoder, UnitContents
from ..cache.finer import FinerPages
from ..cache.snapshot import CacheContents
from ..codecs.checks import LARGEST
from ..errors import ContextError
from ..layout import MEAN_STEP_BYTES, PageUnit
from ..plan import RAW_BITS, Plan
from .entropy import decode_codes, encode_codes, store_library
from .file import ContextHeader, DtypeName, FinerPage, Part, PartSpec

CODES, EXACT, TOKEN_IDS, MEANS = "codes", "exact", "token_ids", "means."
_DTYPES: dict[torch.dtype, DtypeName] = {
    torch.uint8: "uint8", torch.int32: "int32", torch.float16: "float16", torch.bfloat16: "bfloat16",
    torch.float32: "float32", torch.float64: "float64",
}  # fmt: skip
_LEVEL = 9  # of zstandard; higher ones gain nothing on mantissas


def code_bits(plan: Plan) -> list[int]:
    """List the bits of every column of the part ``codes``: packed latents of all blocks, side by side."""
    # In the order in which pages of layers that keep everything, and then of those that keep a window, have them.
    blocks = sorted(plan.blocks, key=lambda block: plan.is_windowed(block.slots[0].layer))
    groups = [group for block in blocks for group in block.groups if group.bits != RAW_BITS]
    return [group.bits for group in groups for _ in range(group.count)]


def specs_of(coder: PageCoder, model_dtype: torch.dtype, header: ContextHeader) -> dict[str, PartSpec]:
    """List, by name, the parts that a cache of that many tokens consists of; token ids come on top."""
    batch, tokens, paged = len(header.padding), header.tokens, header.paged
    kept_exactly = coder.plan.sinks + len(header.finer) * coder.plan.page_tokens + tokens - paged
    plan, geometry = coder.plan, coder.plan.geometry
    heads, dim, layers = geometry.kv_heads, geometry.head_dim, len(plan.coded_layers)
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        CODES: (torch.uint8, (batch, paged, len(code_bits(plan)))),
        EXACT: (coder.dtype, (layers, 2, batch, heads, kept_exactly, dim)),
    }
    for index, unit in enumerate(coder.units):
        shapes[f"raw.{index}"] = (_raw_dtype(unit.unit, coder.dtype), (batch, paged, _raw_width(unit.unit)))
        shapes[f"{MEANS}{index}"] = (torch.uint8, _means_shape(unit.unit, batch, paged))
    for layer in sorted(set(range(geometry.layers)) - set(plan.coded_layers)):
        kept = geometry.kept_tokens(layer, tokens)
        shapes[f"plain.{layer}"] = (model_dtype, (2, batch, heads, kept, dim))
    return {name: _spec(name, dtype, shape) for name, (dtype, shape) in shapes.items() if prod(shape)}


def tensors_of(contents: CacheContents, token_ids: Tensor | None) -> dict[str, Tensor]:
    """Name the tensors of ``contents`` as their parts, on the CPU; parts without elements are left out."""
    named = {f"raw.{index}": unit.raw for index, unit in enumerate(contents.units)}
    named |= {f"{MEANS}{index}": unit.means for index, unit in enumerate(contents.units)}
    if contents.units:
        named[CODES] = torch.cat([unit.codes for unit in contents.units], dim=-1)
    if contents.exact:
        named[EXACT] = torch.stack([torch.stack(sides) for sides in contents.exact.values()])
    named |= {f"plain.{layer}": torch.stack(sides) for layer, sides in contents.plain.items()}
    if token_ids is not None:
        named[TOKEN_IDS] = token_ids.to(torch.int32)
    return {name: tensor.cpu() for name, tensor in named.items() if tensor.numel()}


def contents_of_parts(header: ContextHeader, tensors: Mapping[str, Tensor], coder: PageCoder) -> CacheContents:
    """Undo ``tensors_of``."""
    batch, paged, plan = len(header.padding), header.paged, coder.plan
    geometry = plan.geometry
    widths = [unit.unit.segment.latents - _raw_width(unit.unit) for unit in coder.units]
    codes = tensors.get(CODES, torch.empty(batch, paged, sum(widths), dtype=torch.uint8)).split(widths, dim=-1)
    units = []
    for index, (unit, own) in enumerate(zip(coder.units, codes, strict=False)):
        none = torch.empty(batch, paged, 0, dtype=_raw_dtype(unit.unit, coder.dtype))
        no_means = torch.empty(_means_shape(unit.unit, batch, paged), dtype=torch.uint8)
        means = tensors.get(f"{MEANS}{index}", no_means)
        units.append(UnitContents(tensors.get(f"raw.{index}", none), own, means))
    none = torch.empty(len(plan.coded_layers), 2, batch, geometry.kv_heads, 0, geometry.head_dim, dtype=coder.dtype)
    exact = zip(plan.coded_layers, tensors.get(EXACT, none), strict=True)
    plain = {name.removeprefix("plain."): sides for name, sides in tensors.items() if name.startswith("plain.")}
    return CacheContents(
        tokens=header.tokens,
        paged=paged,
        padding=torch.tensor(header.padding, dtype=torch.int64),
        offset=torch.tensor(header.offset, dtype=torch.int64),
        units=tuple(units),
        exact={layer: (sides[0], sides[1]) for layer, sides in exact},
        plain={int(layer): (sides[0], sides[1]) for layer, sides in plain.items()},
        finer=_finer_pages(header, plan.page_tokens),
    )


def finer_header(finer: FinerPages) -> tuple[FinerPage, ...]:
    """Say in the header which pages are finer."""
    return tuple(
        FinerPage(page=page, shown=tuple(shown))
        for page, shown in zip(finer.pages, finer.shown.T.tolist(), strict=True)
    )


def _finer_pages(header: ContextHeader, page_tokens: int) -> FinerPages:
    """Undo ``finer_header``."""
    none = FinerPages.none(len(header.padding), page_tokens, torch.device("cpu"))
    shown = [none.shown, *(torch.tensor(finer.shown, dtype=torch.int64)[:, None] for finer in header.finer)]
    return replace(none, pages=tuple(finer.page for finer in header.finer), shown=torch.cat(shown, dim=1))


def encode_part(name: str, tensor: Tensor, bits: Sequence[int]) -> tuple[Part, bytes]:
    """Make what the header says of a tensor, and its bytes in the file."""
    if name == CODES:
        data = encode_codes(tensor.flatten(0, 1).numpy(), bits)
    else:
        data = store_library("zstandard").ZstdCompressor(level=_LEVEL).compress(_planes(tensor))
    spec = _spec(name, tensor.dtype, tuple(tensor.shape))
    return Part(**spec.model_dump(), sha256=_sha256(tensor)), data


def decode_part(part: Part, data: memoryview, bits: Sequence[int]) -> Tensor:
    """Decode the tensor of a part.

    Raises:
        ContextError: the bytes do not give it. Checked against the SHA-256 of the tensor itself too, so that another
            version of a library, or another machine, cannot decode to something else unnoticed.
    """
    if part.name == CODES:
        tensor = torch.from_numpy(decode_codes(data, prod(part.shape[:-1]), bits)).view(part.shape)
    else:
        tensor = _decompressed(part, data)
    if _sha256(tensor) != part.sha256:
        raise ContextError(
            f"part {part.name} does not decode to what was saved; use the versions of kvcar, constriction and "
            "zstandard that it was saved with, or save the context again"
        )
    return tensor


def is_sound(tensor: Tensor, name: str = "") -> bool:
    """Whether no element is NaN, infinite, or so large that what is computed with it may not be finite; ``name`` of a part."""
    if name.startswith(MEANS):
        tensor = tensor[..., :MEAN_STEP_BYTES].contiguous().view(torch.float16)
    # As a number of Python: in 16 bits the limit itself would be infinite.
    return not tensor.is_floating_point() or not tensor.numel() or tensor.abs().max().item() <= LARGEST


def _spec(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> PartSpec:
    return PartSpec(name=name, coding="range" if name == CODES else "zstd", dtype=_DTYPES[dtype], shape=shape)


def _raw_width(unit: PageUnit) -> int:
    """Columns of a unit that are no integer codes."""
    return unit.segment.latents if unit.segment.lossless else unit.segment.raw


def _means_shape(unit: PageUnit, batch: int, paged: int) -> tuple[int, int, int]:
    return (batch, -(-paged // unit.segment.page_tokens), 0 if unit.means is None else unit.means.size)


def _raw_dtype(unit: PageUnit, exact: torch.dtype) -> torch.dtype:
    return exact if unit.segment.lossless else torch.float16


def _bytes(tensor: Tensor) -> Tensor:
    """Bytes of the elements, uint8 ``[elements, bytes]``."""
    return tensor.contiguous().view(torch.uint8).reshape(-1, tensor.element_size())


def _sha256(tensor: Tensor) -> str:
    return hashlib.sha256(_bytes(tensor).numpy().data).hexdigest()


def _planes(tensor: Tensor) -> bytes:
    """Bytes of the same significance side by side: exponents repeat where mantissas do not."""
    return _bytes(tensor).T.contiguous().numpy().tobytes()


def _decompressed(part: Part, data: memoryview) -> Tensor:
    """Undo ``_planes`` and zstandard; a frame that claims another size is refused before memory is taken."""
    zstandard, dtype = store_library("zstandard"), getattr(torch, part.dtype)
    try:
        if zstandard.frame_content_size(data) != part.nbytes:
            raise ContextError(f"part {part.name} does not hold {part.nbytes} bytes; save the context again")
        decompressor = zstandard.ZstdDecompressor()
        planes = bytearray(decompressor.decompress(data, max_output_size=part.nbytes, allow_extra_data=False))
    except zstandard.ZstdError as error:
        raise ContextError(f"part {part.name} cannot be decompressed: {error}; save the context again") from None
    elements = torch.frombuffer(planes, dtype=torch.uint8).view(dtype.itemsize, -1).T.contiguous()
    return elements.view(dtype).view(part.shape)
