"""The file of a stored context: a safetensors file of bytes, a JSON header in its metadata, a SHA-256 at its end.

``docs/format.md`` describes it. Whatever a file claims is checked against the file's own size before memory is taken.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, ValidationError, model_validator

from ..bundle import ModelIdentity
from ..errors import ContextError
from ..files import parsed_json, read_regular, reason_of, write_whole
from ..geometry import StrictModel

FORMAT_VERSION = 2
METADATA, CHECKSUM = "kvcar_context", "sha256"
"""Key of the header in the file's metadata, and name of the tensor whose bytes end the file."""

_FIRST_FORMAT = b"KVCARCTX"
_LENGTH = struct.Struct("<Q")
_CHECKSUM_BYTES = hashlib.sha256().digest_size
_MAX_HEADER_BYTES = 1 << 20
_ALIGNMENT = 8  # of the data, as safetensors has it

# Tensors may take so many bytes whatever the size of their file, and so many times that size on top: even a text that
# repeats itself is not compressed further.
_FREE_BYTES, _TIMES_LARGER = 16 << 20, 256

_LARGEST = 2**31 - 1
Count = Annotated[int, Field(ge=0, le=_LARGEST)]
Offset = Annotated[int, Field(ge=-_LARGEST, le=_LARGEST)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Coding = Literal["range", "zstd"]
DtypeName = Literal["uint8", "int32", "float16", "bfloat16", "float32", "float64"]
_ITEM_BYTES: dict[DtypeName, int] = dict(zip(get_args(DtypeName), (1, 4, 2, 2, 4, 8), strict=True))


class PartSpec(StrictModel):
    """One tensor of a stored context; ``coding`` says how its bytes are written."""

    name: Annotated[str, Field(min_length=1, max_length=64)]
    coding: Coding
    dtype: DtypeName
    shape: tuple[Count, ...] = Field(strict=False, max_length=8)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in memory."""
        return prod(self.shape) * _ITEM_BYTES[self.dtype]


class Part(PartSpec):
    """A tensor with the SHA-256 in hex of its own bytes."""

    sha256: Sha256

    @property
    def spec(self) -> PartSpec:
        """What a reader can know beforehand."""
        return PartSpec(name=self.name, coding=self.coding, dtype=self.dtype, shape=self.shape)


class FinerPage(StrictModel):
    """A page whose tokens are stored exactly too; ``shown``: so many of them, of each sequence, are still read from its codes."""

    page: Count
    shown: tuple[Count, ...] = Field(strict=False, min_length=1, fail_fast=True)


class ContextHeader(StrictModel):
    """What a stored context is, and of which model and bundle.

    Attributes:
        model: the model that the bundle was fitted for.
        bundle_sha256: ``Bundle.digest`` of the bundle that it was saved with.
        window: recent tokens that the saved cache kept exact.
        tokens: tokens of each sequence, padding included; paged: those of them that are coded.
        padding, offset: of every sequence of the batch, see ``docs/format.md``.
        finer: pages that are kept exactly, rising.
    """

    format_version: Literal[2] = FORMAT_VERSION
    kvcar_version: Annotated[str, Field(max_length=64)]
    model: ModelIdentity
    bundle_sha256: Sha256
    window: Count
    tokens: Annotated[int, Field(ge=1, le=_LARGEST)]
    paged: Count
    padding: tuple[Count, ...] = Field(strict=False, min_length=1, fail_fast=True)
    offset: tuple[Offset, ...] = Field(strict=False, min_length=1, fail_fast=True)
    finer: tuple[FinerPage, ...] = Field(default=(), strict=False, fail_fast=True)
    parts: tuple[Part, ...] = Field(strict=False, fail_fast=True)

    @property
    def positions(self) -> int:
        """Positions that the longest sequence takes."""
        return self.tokens - min(self.offset)

    @model_validator(mode="after")
    def _consistent(self) -> ContextHeader:
        if len(self.offset) != len(self.padding):
            raise ValueError(f"{len(self.offset)} offsets for {len(self.padding)} sequences")
        if max(self.paged, *self.padding) > self.tokens:
            raise ValueError(f"more coded tokens or more padding than the {self.tokens} tokens")
        if any(offset > padding for offset, padding in zip(self.offset, self.padding, strict=True)):
            raise ValueError("an offset beyond the padding, which puts tokens at negative positions")
        pages = [finer.page for finer in self.finer]
        if pages != sorted(set(pages)) or any(len(finer.shown) != len(self.padding) for finer in self.finer):
            raise ValueError(f"finer pages that do not rise, or are not of {len(self.padding)} sequences")
        names = [part.name for part in self.parts]
        if len({*names, CHECKSUM, "__metadata__"}) != len(names) + 2:
            raise ValueError("two parts of the same name, or one of a name that has another use")
        return self


def write_file(path: Path, header: ContextHeader, payloads: Sequence[bytes]) -> None:
    """Write whole or not at all, through a temporary neighbour; raises ContextError where that cannot be done."""
    sizes = {part.name: len(data) for part, data in zip(header.parts, payloads, strict=True)}
    metadata = {METADATA: json.dumps(header.model_dump(mode="json"), separators=(",", ":"))}
    text = json.dumps({"__metadata__": metadata, **_entries(sizes)}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    if len(text) > _MAX_HEADER_BYTES:
        raise ContextError(
            f"the header of this context takes {len(text)} bytes, more than the {_MAX_HEADER_BYTES} that are read; save "
            "fewer sequences in one file"
        )
    try:
        write_whole(path, _with_checksum([_LENGTH.pack(len(text)), text, *payloads]))
    except (OSError, ValueError) as error:
        raise ContextError(
            f"cannot write {path}: {reason_of(error)}; choose a folder that exists and that you may write to"
        ) from None


def read_file(path: Path) -> tuple[ContextHeader, dict[str, memoryview]]:
    """Read the header and the bytes of every part.

    Raises:
        ContextError: the file is missing, no stored context, of another version, truncated or changed, or claims
            tensors that a file of its size cannot hold.
    """
    data = memoryview(_bytes_of(path))
    fields, start = _read_fields(path, data)
    text = fields.get("__metadata__")
    text = text.get(METADATA) if isinstance(text, dict) else None
    if not isinstance(text, str):
        raise ContextError(f"{path} is a safetensors file, but not a stored context; 'kvcar save' writes one")
    known = _known_version(path, _parsed(path, text.encode(errors="replace")))
    if hashlib.sha256(data[:-_CHECKSUM_BYTES]).digest() != bytes(data[-_CHECKSUM_BYTES:]):
        raise _damaged(path, "its SHA-256 is not the one written at its end")
    header = _header(path, known)
    parts = _parts(path, header, fields, data[start:])
    _check_claims(path, header, len(data))
    return header, parts


def _entries(sizes: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """What safetensors writes of tensors of bytes that lie one after the other, the checksum's last."""
    entries, start = {}, 0
    for name, size in (*sizes.items(), (CHECKSUM, _CHECKSUM_BYTES)):
        entries[name] = {"dtype": "U8", "shape": [size], "data_offsets": [start, start + size]}
        start += size
    return entries


def _with_checksum(pieces: Sequence[bytes]) -> Iterator[bytes]:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
        yield piece
    yield digest.digest()


def _bytes_of(path: Path) -> bytes:
    try:
        return read_regular(path)
    except (OSError, ValueError) as error:
        raise ContextError(f"cannot read the context {path}: {reason_of(error)}; 'kvcar save' writes one") from None


def _read_fields(path: Path, data: memoryview) -> tuple[dict[str, Any], int]:
    """The JSON object that a safetensors file begins with, and where its data start."""
    if data[: len(_FIRST_FORMAT)] == _FIRST_FORMAT:
        raise ContextError(
            f"{path} has context format version 1, of kvcar before its first release; this kvcar reads version "
            f"{FORMAT_VERSION}; save the context again"
        )
    length = _LENGTH.unpack_from(data)[0] if len(data) >= _LENGTH.size else _MAX_HEADER_BYTES + 1
    if length > _MAX_HEADER_BYTES:
        raise ContextError(f"{path} is not a stored context; 'kvcar save' writes one")
    start = _LENGTH.size + length
    if start + _CHECKSUM_BYTES > len(data):
        raise _damaged(path, f"it has only {len(data)} bytes")
    return _parsed(path, bytes(data[_LENGTH.size : start])), start


def _parsed(path: Path, text: bytes) -> dict[str, Any]:
    try:
        fields = parsed_json(text)
    except (ValueError, RecursionError):
        raise _damaged(path, "its header is no JSON") from None
    if not isinstance(fields, dict):
        raise _damaged(path, "its header is no JSON object")
    return fields


def _known_version(path: Path, fields: dict[str, Any]) -> dict[str, Any]:
    version = fields.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise ContextError(
            f"{path} has context format version {str(version)[:20]}; this kvcar reads version {FORMAT_VERSION}; upgrade "
            "kvcar or save the context again"
        )
    return fields


def _header(path: Path, fields: dict[str, Any]) -> ContextHeader:
    try:
        return ContextHeader.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        where = ".".join(str(place) for place in first["loc"])[:80] or "its fields"
        raise _damaged(path, f"its header does not fit at {where}: {first['msg']}") from None


def _parts(path: Path, header: ContextHeader, fields: Mapping[str, Any], data: memoryview) -> dict[str, memoryview]:
    """Bytes of the parts, which must lie as ``write_file`` puts them."""
    entries = {name: entry for name, entry in fields.items() if name != "__metadata__"}
    sizes = {part.name: _size(entries.get(part.name)) for part in header.parts}
    total = sum(sizes.values()) + _CHECKSUM_BYTES
    if min(sizes.values(), default=0) < 0 or total != len(data) or _entries(sizes) != entries:
        raise _damaged(path, "its parts are not those of its header, or do not add up to its length")
    parts, start = {}, 0
    for name, size in sizes.items():
        parts[name] = data[start : start + size]
        start += size
    return parts


def _size(entry: object) -> int:
    """Bytes that a tensor's entry claims; -1 where there is no such entry or it is not one of bytes."""
    shape = entry.get("shape") if isinstance(entry, dict) else None
    return shape[0] if isinstance(shape, list) and len(shape) == 1 and type(shape[0]) is int and shape[0] >= 0 else -1


def _check_claims(path: Path, header: ContextHeader, size: int) -> None:
    """Refuse tensors that are out of all proportion to the file."""
    claimed, allowed = sum(part.nbytes for part in header.parts), _FREE_BYTES + _TIMES_LARGER * size
    if claimed > allowed:
        raise ContextError(
            f"{path} claims tensors of {claimed} bytes, but a context of {size} bytes holds no more than {allowed}; it was "
            "not written by kvcar"
        )


def _damaged(path: Path, how: str) -> ContextError:
    return ContextError(f"{path} is truncated or was changed: {how}; copy it again or save the context again")
