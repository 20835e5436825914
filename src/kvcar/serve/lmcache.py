# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
"""Records in LMCache: a serde, and the adapter for a folder that brings it along.

    {"type": "plugin", "module_path": "kvcar.serve.lmcache", "class_name": "KVCarFolder",
     "adapter_params": {"base_path": "FOLDER", "bundle": "BUNDLE"},
     "serde": {"type": "kvcar", "bundle": "BUNDLE", "model": "MODEL"}}

LMCache hands over chunks of 256 tokens, keys after RoPE, and no positions. They are found (``positions``), stored, and
keys are coded before RoPE. What is no chunk of the bundle's model in 16 or 32 bits (other shapes, several groups, fp8,
NaN) is stored as it is. LMCache's own keys know nothing of codecs, so every bundle has a folder of its own.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from pathlib import Path
from typing import Any

from lmcache.v1.distributed.l2_adapters.fs_l2_adapter import FSL2Adapter, FSL2AdapterConfig
from lmcache.v1.distributed.serde import AsyncSerdeProcessor, Deserializer, Serializer, register_serde_factory
from torch import Tensor

from ..bundle import Bundle
from ..errors import ContextError, InputError, require
from ..files import remove_if_allowed
from .chunks import HEAD_BYTES, ChunkKey, Chunks, checked

_log = logging.getLogger("kvcar.serve")


def _key(key: Any) -> ChunkKey:
    return ChunkKey(key.chunk_hash, key.model_name, key.kv_rank, key.object_group_id, key.cache_salt)


def _groups(obj: Any) -> list[Tensor]:
    return [obj.get_tensor(index) for index in range(len(obj.get_shapes()))]


class KVCarSerializer(Serializer):
    """Chunks to bytes."""

    def __init__(self, chunks: Chunks) -> None:
        self._chunks = chunks

    def serialize(self, src: Any, dst: Any, key: Any) -> int:
        """Write the bytes of a chunk; return how many."""
        data = self._chunks.packed(_groups(src), _key(key))
        memoryview(dst.byte_array).cast("B")[: len(data)] = data
        return len(data)

    def estimate_serialized_size(self, layout_desc: Any) -> int:
        """Most bytes that a chunk takes: those of its tensors and a head."""
        sizes = [s.numel() * d.itemsize for s, d in zip(layout_desc.shapes, layout_desc.dtypes, strict=True)]
        return sum(sizes) + HEAD_BYTES


class KVCarDeserializer(Deserializer):
    """Bytes to chunks."""

    def __init__(self, chunks: Chunks) -> None:
        self._chunks = chunks

    def deserialize(self, src: Any, dst: Any, key: Any) -> None:
        """Fill a chunk; raises ContextError, by which LMCache counts it as missing."""
        self._chunks.unpack(memoryview(src.byte_array).cast("B"), _groups(dst), _key(key))


def processor(options: dict[str, Any]) -> AsyncSerdeProcessor:
    """Make the serde of ``{"bundle": ..., "model": ..., "max_workers": 1}``."""
    given: dict[str, Any] = {"max_workers": 1} | {name: value for name, value in options.items() if name != "type"}
    if set(given) != {"bundle", "model", "max_workers"}:
        raise InputError(f'the serde must be {{"type": "kvcar", "bundle": ..., "model": ...}}; got {options!r}')
    require(str, bundle=given["bundle"], model=given["model"])
    require(int, max_workers=given["max_workers"])
    chunks = Chunks(given["bundle"], given["model"])
    return AsyncSerdeProcessor(KVCarSerializer(chunks), KVCarDeserializer(chunks), given["max_workers"])


@lru_cache(maxsize=1)
def _register() -> None:
    register_serde_factory("kvcar", processor)


_register()


class KVCarFolderConfig(FSL2AdapterConfig):
    """LMCache's own options of a folder, in a folder of the bundle's own."""

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> FSL2AdapterConfig:
        """Read ``{"base_path": ..., "bundle": ...}`` and what LMCache's folder takes besides."""
        bundle = d.get("bundle")
        require(str, bundle=bundle, base_path=d.get("base_path"))
        own = Path(d["base_path"]) / Bundle.from_pretrained(str(bundle)).digest[:32]
        return FSL2AdapterConfig.from_dict({**d, "base_path": str(own)})


class KVCarFolder(FSL2Adapter):
    """LMCache's folder for chunks that are shorter than their buffers; damaged ones are removed and count as missing."""

    def __init__(self, config: FSL2AdapterConfig, l1_memory_desc: Any = None) -> None:
        del l1_memory_desc  # given to every adapter of a user's own
        super().__init__(config)

    def submit_load_task(self, keys: list[Any], objects: list[Any]) -> Any:
        """Load chunks into buffers that are cut to their length first: LMCache's own folder takes shorter ones for incomplete."""
        for key, buffer in zip(keys, objects, strict=True):
            path = self._key_to_path(key)
            try:
                data = path.read_bytes()
                checked(memoryview(data))
                if len(data) <= buffer.get_size():
                    buffer.set_used_size(len(data))
            except FileNotFoundError:
                continue
            except (OSError, ContextError) as error:
                _log.warning("the stored chunk %s is computed again: %s", path.name, error)
                remove_if_allowed(path)
        return super().submit_load_task(keys, objects)
