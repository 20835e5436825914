"""Records in LMCache: a whole store, evict, load through its own storage manager; what it cannot code comes back as it was."""

import time

import pytest
import torch
from record_pages import BUNDLES, coder_of, keys_of, model_and_sides
from tiny import token_ids
from transformers import DynamicCache

pytest.importorskip("lmcache", reason="LMCache is not installed; .ci/lmcache makes an environment for these tests")

from lmcache.v1.distributed.api import GroupedObjectKeys, MemoryLayoutDesc, ObjectKey, PrefetchTaskSpec
from lmcache.v1.distributed.config import (
    EvictionConfig,
    L1ManagerConfig,
    L1MemoryManagerConfig,
    StorageManagerConfig,
)
from lmcache.v1.distributed.l2_adapters.config import L2AdaptersConfig
from lmcache.v1.distributed.l2_adapters.plugin_l2_adapter import PluginL2AdapterConfig
from lmcache.v1.distributed.serde import SerdeConfig
from lmcache.v1.distributed.storage_manager import StorageManager

from kvcar.errors import ContextError
from kvcar.serve.chunks import ChunkKey, Chunks
from kvcar.serve.positions import find_position
from kvcar.serve.records import decode_record, encode_record

CHUNK = 256


@pytest.fixture(scope="module")
def llama():
    """Keys get a mean by a bias, as those of trained models have one."""
    model, *_ = model_and_sides("qwen2", tokens=8)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.bias.normal_(0, 3, generator=torch.Generator().manual_seed(1))
    ids, cache = token_ids(512), DynamicCache()
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
    sides = (torch.stack([getattr(layer, side)[0] for layer in cache.layers]) for side in ("keys", "values"))
    return model, ids, *sides


@pytest.fixture(scope="module")
def folders(llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lmcache")
    llama[0].save_pretrained(folder / "model")
    bundle = BUNDLES["fitted"](llama[0])
    bundle.save_pretrained(folder / "bundle")
    return folder, bundle


def chunk_of(sides, index, fused=False):
    """A chunk as LMCache holds it: ``[2, L, T, H * D]``, or fused."""
    keys, values = (side[:, :, CHUNK * index : CHUNK * (index + 1)].transpose(1, 2) for side in sides)
    if fused:
        return torch.cat([keys, values], dim=-1).flatten(2)[None].contiguous()
    return torch.stack([keys.flatten(2), values.flatten(2)])


def manager(folder, records):
    config = PluginL2AdapterConfig.from_dict(
        {
            "module_path": "kvcar.serve.lmcache",
            "class_name": "KVCarFolder",
            "adapter_params": {"base_path": str(records), "bundle": str(folder / "bundle")},
        }
    )
    config.serde_config = SerdeConfig("kvcar", {"bundle": str(folder / "bundle"), "model": str(folder / "model")})
    memory = L1MemoryManagerConfig(64 << 20, use_lazy=False, shm_name="")
    return StorageManager(
        StorageManagerConfig(L1ManagerConfig(memory), EvictionConfig("LRU"), L2AdaptersConfig([config]))
    )


def store(own, keys, chunks):
    layout = MemoryLayoutDesc([chunks[0].shape], [chunks[0].dtype])
    reserved = own.reserve_write(keys, layout)
    for key, chunk in zip(keys, chunks, strict=True):
        reserved[key].get_tensor(0).copy_(chunk)
    own.finish_write(keys)
    return layout


def files(records):
    return sorted(path for path in records.rglob("*.data"))


def until(done):
    stop = time.monotonic() + 60
    while not done():
        assert time.monotonic() < stop
        time.sleep(0.05)


def load(own, keys, layout):
    """Chunks by the storage manager's own prefetch, as far as they are there."""
    spec = PrefetchTaskSpec([GroupedObjectKeys(keys, 0, layout)])
    handle, found = own.submit_prefetch_task(spec), []
    until(lambda: found.append(own.query_prefetch_status(handle)) or found[-1] is not None)
    hits = found[-1].hit_cells[0].get_indices_list()
    there = [keys[index] for index in hits]
    with own.read_prefetched_results(there, found[-1].l1_owners) as objects:
        made = [each.get_tensor(0).clone() for each in objects or []]
    own.finish_read_prefetched(there)
    return hits, made


def test_a_whole_store_evict_and_load(llama, folders, tmp_path):
    folder, bundle = folders
    chunks = [chunk_of(llama[2:], index) for index in (0, 1)]
    keys = [ObjectKey(bytes([index] * 32), "tiny", 1) for index in (0, 1)]
    own = manager(folder, tmp_path)
    try:
        layout = store(own, keys, chunks)
        until(lambda: len(files(tmp_path)) == 2)
        assert all(path.stat().st_size < chunks[0].nbytes / 2 for path in files(tmp_path))
        assert all(bundle.digest[:32] in str(path) for path in files(tmp_path))
        until(lambda: own.delete_l1_keys(keys, force=False)[1] == 0)
        hits, made = load(own, keys, layout)
    finally:
        own.close()
    assert hits == [0, 1]
    coder = coder_of(llama[0], bundle)
    for index, (chunk, key) in enumerate(zip(made, keys_of(coder, llama[1]), strict=True)):
        sides = [side[:, :, CHUNK * index : CHUNK * (index + 1)] for side in llama[2:]]
        wanted = decode_record(coder, encode_record(coder, *sides, key), key)
        torch.testing.assert_close(chunk, chunk_of(wanted, 0), atol=1e-5, rtol=1e-4)

    # Another process: what is there is loaded, what is damaged is not, and is gone.
    damaged = files(tmp_path)[1]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    again = manager(folder, tmp_path)
    try:
        hits, made_again = load(again, keys, layout)
    finally:
        again.close()
    assert hits == [0]
    assert torch.equal(made_again[0], made[0])
    assert len(files(tmp_path)) == 1


@pytest.fixture(scope="module")
def chunks(folders):
    return Chunks(str(folders[0] / "bundle"), str(folders[0] / "model"))


def test_positions_are_found(llama, folders):
    coder = coder_of(llama[0], folders[1])
    assert [find_position(coder, llama[2][:, :, start : start + CHUNK], CHUNK) for start in (0, 256)] == [0, 256]


def test_a_fused_chunk_is_coded_as_a_plain_one(llama, chunks):
    made = []
    for fused in (False, True):
        chunk = chunk_of(llama[2:], 1, fused)
        data = chunks.packed([chunk], ChunkKey(b"a", "tiny"))
        assert len(data) < chunk.nbytes / 2
        back = torch.zeros_like(chunk)
        chunks.unpack(memoryview(data + bytes(100)), [back], ChunkKey(b"a", "tiny"))
        made.append(back.unflatten(-1, (2, -1)) if not fused else back[0].unflatten(-1, (2, 2, 16)).transpose(-2, -3))
    plain, fused = made[0], made[1].transpose(0, 0)
    torch.testing.assert_close(plain[0], fused[:, :, 0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(plain[1], fused[:, :, 1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "groups",
    [
        [torch.arange(2 * 4 * 256 * 32, dtype=torch.int32).to(torch.uint8).view(2, 4, 256, 32)],
        [torch.randn(2, 3, 256, 32)],
        [torch.randn(2, 4, 300, 32)],
        [torch.randn(2, 4, 16, 32), torch.randn(1, 4, 16, 8).half()],
        [torch.full((2, 4, 16, 32), float("nan"))],
    ],
    ids=["bytes", "other layers", "long", "two groups", "NaN"],
)
def test_what_cannot_be_coded_comes_back_as_it_was(chunks, groups):
    back = [torch.zeros_like(group) for group in groups]
    chunks.unpack(memoryview(chunks.packed(groups, ChunkKey(b"a", "tiny"))), back, ChunkKey(b"a", "tiny"))
    for own, wanted in zip(back, groups, strict=True):
        assert torch.equal(own.view(torch.uint8), wanted.view(torch.uint8))


def test_damaged_and_foreign_chunks_are_refused(llama, chunks):
    chunk = chunk_of(llama[2:], 1)
    data = chunks.packed([chunk], ChunkKey(b"a", "tiny"))
    for place in range(0, len(data), 501):
        changed = bytearray(data)
        changed[place] ^= 64
        if not 9 <= place < 16:  # bytes that are not used
            with pytest.raises(ContextError):
                chunks.unpack(memoryview(changed), [torch.zeros_like(chunk)], ChunkKey(b"a", "tiny"))
    for kept in (0, 10, 47, len(data) - 1):
        with pytest.raises(ContextError):
            chunks.unpack(memoryview(data[:kept]), [torch.zeros_like(chunk)], ChunkKey(b"a", "tiny"))
    with pytest.raises(ContextError, match="of no use here"):
        chunks.unpack(memoryview(data), [torch.zeros_like(chunk)], ChunkKey(b"b", "tiny"))
    for other in (torch.zeros(2, 4, 255, 32), torch.zeros(2, 4, 256, 32).half(), torch.zeros(2, 4, 256, 31)):
        with pytest.raises(ContextError):
            chunks.unpack(memoryview(data), [other], ChunkKey(b"a", "tiny"))
