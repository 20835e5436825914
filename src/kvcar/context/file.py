"""The file of a stored context: a JSON header, parts of bytes, and a SHA-256 over both. See ``docs/format.md``."""

from __future__ import annotations

import hashlib
import json
import struct
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator

from ..bundle import ModelIdentity
from ..errors import ContextError
from ..geometry import PositiveInt, StrictModel

MAGIC = b"KVCARCTX"
FORMAT_VERSION = 1
_LENGTH = struct.Struct("<Q")
_CHECKSUM_BYTES = hashlib.sha256().digest_size

Count = Annotated[int, Field(ge=0)]
Coding = Literal["range", "zstd"]
DtypeName = Literal["uint8", "int32", "float16", "bfloat16", "float32", "float64"]


class PartSpec(StrictModel):
    """One tensor of a stored context; ``coding`` says how its bytes are written."""

    name: str
    coding: Coding
    dtype: DtypeName
    shape: tuple[Count, ...] = Field(strict=False)


class Part(PartSpec):
    """A tensor, the bytes that it takes in the file (in the order of the header's list), and its own SHA-256 in hex."""

    stored_bytes: Count
    sha256: str

    @property
    def spec(self) -> PartSpec:
        """What a reader can know beforehand."""
        return PartSpec(name=self.name, coding=self.coding, dtype=self.dtype, shape=self.shape)


class ContextHeader(StrictModel):
    """What a stored context is, and of which model and bundle.

    Attributes:
        model: the model that the bundle was fitted for.
        bundle_sha256: ``Bundle.digest`` of the bundle that it was saved with.
        window: recent tokens that the saved cache kept exact.
        tokens: tokens held, padding included; paged: those of them that are coded.
        padding, offset: of every sequence of the batch, see ``docs/format.md``.
    """

    format_version: Literal[1] = FORMAT_VERSION
    kvcar_version: str
    model: ModelIdentity
    bundle_sha256: str
    window: Count
    tokens: PositiveInt
    paged: Count
    padding: tuple[Count, ...] = Field(strict=False, min_length=1)
    offset: tuple[int, ...] = Field(strict=False, min_length=1)
    parts: tuple[Part, ...] = Field(strict=False)

    @model_validator(mode="after")
    def _consistent(self) -> ContextHeader:
        if len(self.offset) != len(self.padding):
            raise ValueError(f"{len(self.offset)} offsets for {len(self.padding)} sequences")
        if max(self.paged, *self.padding) > self.tokens:
            raise ValueError(f"more coded tokens or more padding than the {self.tokens} tokens")
        return self


def write_file(path: Path, header: ContextHeader, payloads: Sequence[bytes]) -> None:
    """Write whole or not at all, through a temporary neighbour; raises ContextError where that cannot be done."""
    text = json.dumps(header.model_dump(mode="json"), separators=(",", ":")).encode()
    digest, staging = hashlib.sha256(), None
    try:
        with tempfile.NamedTemporaryFile(dir=path.absolute().parent, prefix=".kvcar-", delete=False) as out:
            staging = Path(out.name)
            for piece in (MAGIC, _LENGTH.pack(len(text)), text, *payloads):
                digest.update(piece)
                out.write(piece)
            out.write(digest.digest())
        staging.chmod(0o644)
        staging.replace(path)
    except OSError as error:
        raise ContextError(
            f"cannot write {path}: {error.strerror or error}; choose a folder that exists and that you may write to"
        ) from None
    finally:
        if staging is not None:
            staging.unlink(missing_ok=True)


def read_file(path: Path) -> tuple[ContextHeader, dict[str, memoryview]]:
    """Header and the bytes of every part.

    Raises:
        ContextError: the file is missing, no stored context, of an unknown version, truncated or changed.
    """
    try:
        data = memoryview(path.read_bytes())
    except OSError as error:
        raise ContextError(f"cannot read the context {path}: {error.strerror}; 'kvcar save' writes one") from None
    start = len(MAGIC) + _LENGTH.size
    if bytes(data[: len(MAGIC)]) != MAGIC:
        raise ContextError(f"{path} is not a stored context; 'kvcar save' writes one")
    if len(data) < start + _CHECKSUM_BYTES:
        raise _damaged(path, f"it has only {len(data)} bytes")
    stop = start + _LENGTH.unpack(data[len(MAGIC) : start])[0]
    body = data[:-_CHECKSUM_BYTES]
    if stop > len(body):
        raise _damaged(path, "it ends within its header")
    header = _read_header(path, bytes(body[start:stop]))
    if hashlib.sha256(body).digest() != bytes(data[-_CHECKSUM_BYTES:]):
        raise _damaged(path, "its SHA-256 is not the one written at its end")
    parts: dict[str, memoryview] = {}
    for part in header.parts:
        parts[part.name] = body[stop : stop + part.stored_bytes]
        stop += part.stored_bytes
    if stop != len(body) or len(parts) != len(header.parts):
        raise _damaged(path, "its parts do not add up to its length")
    return header, parts


def _read_header(path: Path, text: bytes) -> ContextHeader:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        raise _damaged(path, "its header is no JSON") from None
    version = fields.get("format_version") if isinstance(fields, dict) else None
    if version != FORMAT_VERSION:
        raise ContextError(
            f"{path} has context format version {version!r}; this kvcar reads version {FORMAT_VERSION}; upgrade kvcar "
            "or save the context again"
        )
    try:
        return ContextHeader.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(place) for place in first["loc"]) or "its fields"
        raise _damaged(path, f"its header does not fit at {where}: {first['msg']}") from None


def _damaged(path: Path, how: str) -> ContextError:
    return ContextError(f"{path} is truncated or was changed: {how}; copy it again or save the context again")
