"""Records as bytes: a header in JSON, the bytes of its parts, a SHA-256 over all of it; and what records are named by.

``docs/format.md`` describes them. Whatever a record claims is checked against what its reader expects before memory is
taken.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import Field, ValidationError, model_validator

from ..context.file import Count, DtypeName, Sha256
from ..errors import ContextError, InputError
from ..files import parsed_json
from ..geometry import StrictModel

MAGIC = b"KVCARREC"
FORMAT_VERSION = 1
PAGE_TOKENS = 256
"""Tokens of a record."""

_LENGTH = struct.Struct("<I")
_CHECKSUM_BYTES = hashlib.sha256().digest_size
MAX_HEADER_BYTES = 1 << 18

Coding = Literal["page", "zstd"]


class RecordKey(NamedTuple):
    """What a record is asked for by.

    Attributes:
        chain: SHA-256 in hex over model, bundle and all tokens up to the record's last, see ``token_chain``.
        position: of the first token; None where it is not known, and keys are coded as they are after RoPE.
    """

    chain: str
    position: int | None


def token_chain(
    tokens: Sequence[int], fingerprint: str, digest: str, salt: bytes = b"", page_tokens: int = PAGE_TOKENS
) -> list[RecordKey]:
    """List the keys of all whole pages of a text.

    Args:
        tokens: of the text, from its beginning.
        fingerprint: of the model.
        digest: of the bundle.
        salt: whatever else decides what keys and values are: adapters, a tenant.
        page_tokens: tokens of a page.

    Raises:
        InputError: ids that are no whole numbers below 2^31.
    """
    ids = np.asarray(tokens, dtype=np.int64)
    if ids.ndim != 1 or (ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < 2**31):
        raise InputError("token ids must be a list of whole numbers from 0 to 2^31 - 1; give those of the tokenizer")
    link = hashlib.sha256(b"\n".join([MAGIC, fingerprint.encode(), digest.encode(), salt])).digest()
    keys = []
    for start in range(0, len(ids) - page_tokens + 1, page_tokens):
        link = hashlib.sha256(link + ids[start : start + page_tokens].astype("<i4").tobytes()).digest()
        keys.append(RecordKey(link.hex(), start))
    return keys


class RecordPart(StrictModel):
    """One tensor of a record; ``coding`` says how its bytes are written, ``size`` how many they are."""

    name: Annotated[str, Field(min_length=1, max_length=64)]
    coding: Coding
    dtype: DtypeName
    shape: tuple[Count, ...] = Field(strict=False, max_length=8)
    size: Count
    sha256: Sha256


class RecordHeader(StrictModel):
    """What a record is, and of which model and bundle.

    Attributes:
        model_fingerprint: of the model.
        bundle_sha256: ``Bundle.digest``.
        layers, kv_heads, head_dim: of the model's cache.
        dtype: of the keys and values that were given.
        chain, position: see ``RecordKey``.
        tokens: of the record.
        exact: so many of its first tokens are kept exactly.
    """

    format_version: Literal[1] = FORMAT_VERSION
    kvcar_version: Annotated[str, Field(max_length=64)]
    model_fingerprint: Sha256
    bundle_sha256: Sha256
    layers: Count
    kv_heads: Count
    head_dim: Count
    dtype: DtypeName
    chain: Sha256
    position: Count | None
    tokens: Annotated[int, Field(ge=1, le=PAGE_TOKENS)]
    exact: Count
    parts: tuple[RecordPart, ...] = Field(strict=False, fail_fast=True)

    @model_validator(mode="after")
    def _consistent(self) -> RecordHeader:
        if self.exact > self.tokens:
            raise ValueError(f"{self.exact} exact tokens of {self.tokens}")
        if len({part.name for part in self.parts}) != len(self.parts):
            raise ValueError("two parts of the same name")
        return self


def put_together(header: RecordHeader, payloads: Sequence[bytes]) -> bytes:
    """Make the bytes of a record; raises InputError where its header is beyond what is read."""
    text = json.dumps(header.model_dump(mode="json"), separators=(",", ":")).encode()
    if len(text) > MAX_HEADER_BYTES:
        raise InputError(f"the header of this record takes {len(text)} bytes, more than the {MAX_HEADER_BYTES} read")
    data = b"".join([MAGIC, _LENGTH.pack(len(text)), text, *payloads])
    return data + hashlib.sha256(data).digest()


def take_apart(data: bytes | memoryview) -> tuple[RecordHeader, dict[str, memoryview]]:
    """Read the header and the bytes of every part.

    Raises:
        ContextError: no record, one of another version, truncated or changed.
    """
    view = memoryview(data)
    start = len(MAGIC) + _LENGTH.size
    if bytes(view[: len(MAGIC)]) != MAGIC:
        raise ContextError("this is no record of kvcar's; write it again")
    if len(view) < start + _CHECKSUM_BYTES:
        raise _damaged(f"it has only {len(view)} bytes")
    if hashlib.sha256(view[:-_CHECKSUM_BYTES]).digest() != bytes(view[-_CHECKSUM_BYTES:]):
        raise _damaged("its SHA-256 is not the one written at its end")
    stop = start + _LENGTH.unpack_from(view, len(MAGIC))[0]
    if stop > min(start + MAX_HEADER_BYTES, len(view) - _CHECKSUM_BYTES):
        raise _damaged("its header is longer than the record")
    header = _header(bytes(view[start:stop]))
    if sum(part.size for part in header.parts) != len(view) - _CHECKSUM_BYTES - stop:
        raise _damaged("its parts do not add up to its length")
    parts = {}
    for part in header.parts:
        parts[part.name] = view[stop : stop + part.size]
        stop += part.size
    return header, parts


def _header(text: bytes) -> RecordHeader:
    try:
        fields: Any = parsed_json(text)
        version = fields["format_version"]
    except (ValueError, RecursionError, KeyError, TypeError):
        raise _damaged("its header is no JSON object with a version") from None
    if type(version) is not int or version != FORMAT_VERSION:
        raise ContextError(
            f"the record has format version {str(version)[:20]}; this kvcar reads version {FORMAT_VERSION}; write it again"
        )
    try:
        return RecordHeader.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        where = ".".join(str(place) for place in first["loc"])[:80] or "its fields"
        raise _damaged(f"its header does not fit at {where}: {first['msg']}") from None


def _damaged(how: str) -> ContextError:
    return ContextError(f"the record is truncated or was changed: {how}; write it again")
