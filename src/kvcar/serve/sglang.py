# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
"""Records in SGLang's hierarchical cache: a storage backend of whole pages.

    --enable-hierarchical-cache --page-size 256 --hicache-storage-backend dynamic
    --hicache-storage-backend-extra-config '{"backend_name": "kvcar", "module_path": "kvcar.serve.sglang",
        "class_name": "KVCarStorage", "bundle": "BUNDLE", "model": "MODEL", "folder": "FOLDER"}'

Written against ``HiCacheStorage`` of commit 001067f (2026) as it reads, and tested against that interface alone: SGLang
itself was not run, as it needs a GPU. So the shape of its host pages ``[2, L, T, H, D]`` (``layer_first``) or
``[T, 2, L, H, D]``, its keys (hashes of all tokens up to a page), and what its threads do with failures are read and not
seen. Keys arrive after RoPE and without positions, as in LMCache; they are found, and what no record can hold is stored
as it is. One worker holds all heads: tensor and pipeline parallelism are refused.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ContextError, InputError, UnsupportedModelError, require
from ..files import read_regular, reason_of, remove_if_allowed, write_whole
from .chunks import ChunkKey, Chunks

HiCacheStorage: Any = object
with suppress(ImportError):  # for whoever looks at this file, or tests it, without SGLang
    from sglang.srt.mem_cache.hicache_storage import HiCacheStorage  # pyright: ignore

_log = logging.getLogger("kvcar.serve")

SUFFIX = ".kvp"
_OPTIONS = ("bundle", "model", "folder")


class KVCarStorage(HiCacheStorage):
    """See the module.

    Args:
        storage_config: SGLang's, whose ``extra_config`` names bundle, model and folder.

    Raises:
        InputError: one of them is missing.
        UnsupportedModelError: keys and values are spread over several workers, or of another kind.
    """

    def __init__(self, storage_config: Any, *_: Any) -> None:
        given = storage_config.extra_config or {}
        options = {name: given.get(name) for name in _OPTIONS}
        require(str, bundle=options["bundle"], model=options["model"], folder=options["folder"])
        spread = {
            "tensor parallelism": storage_config.tp_size > 1,
            "pipeline parallelism": storage_config.pp_size > 1,
            "context parallelism": getattr(storage_config, "attn_cp_size", 1) > 1,
            "latent attention (MLA)": storage_config.is_mla_model,
        }
        found = [name for name, there in spread.items() if there]
        if found:
            raise UnsupportedModelError(f"kvcar's storage for SGLang does not support {', '.join(found)}")
        self._page_first = bool(storage_config.is_page_first_layout)
        self._chunks = Chunks(str(options["bundle"]), str(options["model"]))
        self._folder = Path(str(options["folder"])) / self._chunks.digest[:32]
        self._model = storage_config.model_name or ""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot make the folder {self._folder}: {reason_of(error)}; choose another one") from None

    def exists(self, key: str) -> bool:
        """Whether there is a page of this key; it is looked at when it is read."""
        return self._path(key).is_file()

    def batch_exists(self, keys: list[str], extra_info: Any = None) -> int:
        """Count the keys at the beginning that have pages."""
        del extra_info
        return next((index for index, key in enumerate(keys) if not self.exists(key)), len(keys))

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> Tensor | None:
        """Fill a flat host page with the page of a key; None where there is none, or it is damaged and removed."""
        del target_sizes
        require(Tensor, target_location=target_location)
        path, chunk = self._path(key), self._chunk(target_location)
        try:
            data = read_regular(path, 2 * target_location.nbytes + (1 << 20))
            made = torch.empty(chunk.shape, dtype=chunk.dtype)
            self._chunks.unpack(memoryview(data), [made], self._key(key))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, ContextError) as error:
            _log.warning("the stored page %s is computed again: %s", path.name, error)
            remove_if_allowed(path)
            return None
        chunk.copy_(made)
        return target_location

    def batch_get(
        self, keys: list[str], target_locations: Sequence[Any] | None = None, target_sizes: Any = None
    ) -> list[Tensor | None]:
        """``get`` of every key."""
        del target_sizes
        return [self.get(key, place) for key, place in zip(keys, target_locations or (), strict=True)]

    def set(self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None) -> bool:
        """Write a flat host page; False where it could not be written, which is logged."""
        del target_location, target_sizes
        require(Tensor, value=value)
        path = self._path(key)
        if path.is_file():
            return True
        try:
            data = self._chunks.packed([self._chunk(value).cpu()], self._key(key))
            path.parent.mkdir(parents=True, exist_ok=True)  # somebody may have removed the whole folder
            write_whole(path, [data])
        except OSError as error:
            _log.warning("no page is written to %s: %s", path, reason_of(error))
            return False
        return True

    def batch_set(
        self,
        keys: list[str],
        values: Sequence[Any] | None = None,
        target_locations: Any = None,
        target_sizes: Any = None,
    ) -> bool:
        """``set`` of every key; whether all were written."""
        del target_locations, target_sizes
        written = [self.set(key, value) for key, value in zip(keys, values or (), strict=True)]
        return all(written)

    def batch_get_v1(self, keys: list[str], host_indices: Tensor, extra_info: Any = None) -> list[bool]:
        """Fill pages of the host pool that SGLang has registered."""
        del extra_info
        pool = self.mem_pool_host
        found = []
        for key, index in zip(keys, host_indices[:: pool.page_size].tolist(), strict=True):
            page = self.get(key, pool.get_dummy_flat_data_page())
            if page is not None:
                pool.set_from_flat_data_page(index, page)
            found.append(page is not None)
        return found

    def batch_set_v1(self, keys: list[str], host_indices: Tensor, extra_info: Any = None) -> list[bool]:
        """Write pages of the host pool."""
        del extra_info
        pool = self.mem_pool_host
        starts = host_indices[:: pool.page_size].tolist()
        return [self.set(key, pool.get_data_page(index, flat=True)) for key, index in zip(keys, starts, strict=True)]

    def clear(self) -> None:
        """Remove the pages of this bundle."""
        for path in self._folder.rglob(f"*{SUFFIX}"):
            path.unlink(missing_ok=True)

    def _key(self, key: str) -> ChunkKey:
        return ChunkKey(key.encode(), self._model)

    def _path(self, key: str) -> Path:
        name = hashlib.sha256(f"{self._model}\n{key}".encode()).hexdigest()
        return self._folder / name[:2] / (name + SUFFIX)

    def _chunk(self, page: Tensor) -> Tensor:
        """A flat host page as ``[2, L, T, H * D]``, in place; flat bytes where it is of another size."""
        geometry = self._chunks.geometry
        width = geometry.kv_heads * geometry.head_dim
        tokens, rest = divmod(page.numel(), 2 * geometry.layers * width)
        if rest or not tokens:
            return page.flatten()
        if self._page_first:
            return page.view(2, tokens, geometry.layers, width).transpose(1, 2)
        return page.view(2, geometry.layers, tokens, width)
