"""Chunks of keys and values that engines store without saying where they stand: as records where they can be coded.

What is no chunk of the bundle's model in 16 or 32 bits (other shapes, several tensors, fp8, NaN) is kept as it is. Both
have a head with a length and a checksum, behind which a buffer may hold anything.
"""

from __future__ import annotations

import hashlib
import logging
import struct
from collections.abc import Sequence
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import AutoConfig

from ..bundle import Bundle
from ..context import check_store
from ..errors import ContextError, InputError
from ..geometry import KVGeometry
from .positions import find_position
from .record_coder import DTYPES, RecordCoder
from .record_file import PAGE_TOKENS, RecordKey, take_apart
from .records import decode_record, encode_record
from .vllm.model import check_weights, rotation_of

_log = logging.getLogger("kvcar.serve")

MAGIC = b"KVCARLMC"
_HEAD = struct.Struct("<8sB7xQ32s")
"""Magic, kind, bytes of the content, its SHA-256."""
HEAD_BYTES = _HEAD.size
_RAW, _RECORD = 0, 1


class ChunkKey(NamedTuple):
    """What an engine knows a chunk by; ``hash`` covers all tokens up to its last."""

    hash: bytes
    model: str
    rank: int = 0
    group: int = 0
    salt: str = ""

    @property
    def chain(self) -> str:
        """What a record is asked for by."""
        return hashlib.sha256(repr((self.hash.hex(), *self[1:])).encode()).hexdigest()


class Chunks:
    """Chunks as records, and back.

    Args:
        bundle: folder, or id on the hub.
        model: folder or hub id of the model that is served.

    Raises:
        KVCarError: the bundle is not the model's, or records cannot hold its cache.
    """

    def __init__(self, bundle: str, model: str) -> None:
        check_store()
        self._bundle = Bundle.from_pretrained(bundle)
        check_weights(self._bundle, SimpleNamespace(model=model, revision=None))
        rotary = rotation_of(AutoConfig.from_pretrained(model), self._bundle.plan.geometry)
        # Made at once, so that what no record can hold is refused at the start.
        self._coders = {dtype: RecordCoder(self._bundle, lambda _: rotary, dtype) for dtype in DTYPES}

    @property
    def digest(self) -> str:
        """Of the bundle."""
        return self._bundle.digest

    @property
    def geometry(self) -> KVGeometry:
        """Of the model's cache."""
        return self._bundle.plan.geometry

    def packed(self, groups: Sequence[Tensor], key: ChunkKey) -> bytes:
        """The bytes of a chunk: a record where it can be one and that is smaller."""
        raw = b"".join(group.contiguous().view(torch.uint8).flatten().numpy().tobytes() for group in groups)
        record = self._record(groups, key)
        kind, content = (_RAW, raw) if record is None or len(record) >= len(raw) else (_RECORD, record)
        return _HEAD.pack(MAGIC, kind, len(content), hashlib.sha256(content).digest()) + content

    def unpack(self, data: memoryview, groups: Sequence[Tensor], key: ChunkKey) -> None:
        """Fill the tensors of a chunk; raises ContextError where the bytes are damaged, foreign or of another shape."""
        kind, content = checked(data)
        if kind == _RECORD:
            self._fill(content, groups, key)
            return
        sizes = [group.nbytes for group in groups]
        if sum(sizes) != len(content):
            raise ContextError(f"a chunk of {len(content)} bytes does not fit the {sum(sizes)} that are wanted")
        start = 0
        for group, size in zip(groups, sizes, strict=True):
            own = torch.frombuffer(bytearray(content[start : start + size]), dtype=torch.uint8)
            group.copy_(own.view(group.dtype).view(group.shape))
            start += size

    def _record(self, groups: Sequence[Tensor], key: ChunkKey) -> bytes | None:
        sides = self._sides(groups)
        if sides is None:
            return None
        keys, values = (side.clone() for side in sides)
        coder = self._coders[keys.dtype]
        try:
            return encode_record(coder, keys, values, RecordKey(key.chain, find_position(coder, keys, PAGE_TOKENS)))
        except InputError as error:
            _log.warning("a chunk is stored as it is: %s", error)
            return None

    def _fill(self, content: memoryview, groups: Sequence[Tensor], key: ChunkKey) -> None:
        sides = self._sides(groups)
        if sides is None:
            raise ContextError("a record was stored where a chunk of another shape or dtype is wanted")
        position = take_apart(content)[0].position
        made = decode_record(self._coders[sides[0].dtype], content, RecordKey(key.chain, position))
        for side, own in zip(sides, made, strict=True):
            if side.shape != own.shape:
                raise ContextError(
                    f"a record of shape {tuple(own.shape)} is stored where {tuple(side.shape)} is wanted"
                )
            side.copy_(own)

    def _sides(self, groups: Sequence[Tensor]) -> tuple[Tensor, Tensor] | None:
        """Views of a chunk's keys and values ``[L, H, T, D]``; None where it is none of the bundle's model."""
        geometry = self._bundle.plan.geometry
        if len(groups) != 1 or groups[0].ndim != 4 or groups[0].dtype not in DTYPES:
            return None
        (chunk,) = groups
        two, layers, tokens, width = chunk.shape
        heads, dim = geometry.kv_heads, geometry.head_dim
        if layers != geometry.layers or not 1 <= tokens <= PAGE_TOKENS:
            return None
        if (two, width) == (2, heads * dim):
            keys, values = chunk.unflatten(-1, (heads, dim)).unbind(0)
        elif (two, width) == (1, heads * 2 * dim):
            keys, values = chunk[0].unflatten(-1, (heads, 2 * dim)).chunk(2, dim=-1)
        else:
            return None
        return keys.transpose(1, 2), values.transpose(1, 2)


def checked(data: memoryview) -> tuple[int, memoryview]:
    """Kind and content of a chunk's bytes, behind which a buffer may have more; raises ContextError for damage."""
    if len(data) < _HEAD.size:
        raise ContextError(f"a chunk of {len(data)} bytes is truncated")
    magic, kind, size, digest = _HEAD.unpack_from(data)
    content = data[_HEAD.size : _HEAD.size + size]
    if magic != MAGIC or kind not in (_RAW, _RECORD) or len(content) != size:
        raise ContextError("a chunk is truncated, or was not written by kvcar")
    if hashlib.sha256(content).digest() != digest:
        raise ContextError("a chunk was changed: its SHA-256 is not the one that was written with it")
    return kind, content
