"""SGLang's storage backend, against its interface alone: flat host pages in and out by key."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from record_pages import BUNDLES, coder_of, keys_of

from kvcar.errors import InputError, UnsupportedModelError
from kvcar.serve.records import decode_record, encode_record
from kvcar.serve.sglang import SUFFIX, KVCarStorage


@pytest.fixture(scope="module")
def folders(llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sglang")
    llama[0].save_pretrained(folder / "model")
    bundle = BUNDLES["fitted"](llama[0])
    bundle.save_pretrained(folder / "bundle")
    return folder, bundle


def storage(folders, records, page_first=False, **changes):
    own = {"bundle": str(folders[0] / "bundle"), "model": str(folders[0] / "model"), "folder": str(records)}
    config = {
        "tp_rank": 0, "tp_size": 1, "pp_rank": 0, "pp_size": 1, "attn_cp_size": 1, "is_mla_model": False,
        "is_page_first_layout": page_first, "model_name": "tiny", "extra_config": own,
    }  # fmt: skip
    return KVCarStorage(SimpleNamespace(**(config | changes)))


def flat(keys, values, page_first):
    """A host page: ``[2, L, T, H, D]``, or tokens before layers."""
    page = torch.stack([keys.transpose(1, 2), values.transpose(1, 2)])
    return (page.transpose(1, 2) if page_first else page).flatten().clone()


@pytest.mark.parametrize("page_first", [False, True])
def test_pages_come_back(llama, folders, tmp_path, page_first):
    sides = [side[:, :, :256] for side in llama[2:]]
    page, own = flat(*sides, page_first), storage(folders, tmp_path, page_first)
    assert (own.exists("a"), own.batch_exists(["a", "b"]), own.get("a", torch.empty_like(page))) == (False, 0, None)
    assert own.batch_set(["a", "b"], [page, page])
    assert own.set("a", page)
    assert (own.exists("a"), own.batch_exists(["a", "b", "c"])) == (True, 2)
    files = sorted(tmp_path.rglob(f"*{SUFFIX}"))
    assert all(path.stat().st_size < page.nbytes / 2 for path in files)
    # Another process, with places to be filled.
    again = storage(folders, tmp_path, page_first)
    first, missing = again.batch_get(["a", "c"], [torch.empty_like(page), torch.empty_like(page)])
    assert missing is None
    coder = coder_of(llama[0], folders[1])
    key = keys_of(coder, llama[1])[0]
    wanted = flat(*decode_record(coder, encode_record(coder, *sides, key), key), page_first)
    # A tiny model's keys have no mean, by which their place is found: what comes back is as near as its codec is.
    rest = ((first - page).square().mean() / page.square().mean()).item()
    assert rest < 2 * ((wanted - page).square().mean() / page.square().mean()).item() + 0.2
    # Of another key it is of no use; damaged ones are gone.
    files[0].write_bytes(files[1].read_bytes())
    files[1].write_bytes(files[1].read_bytes()[:-3])
    assert again.batch_get(["a", "b"], [torch.empty_like(page)] * 2) == [None, None]
    assert not list(tmp_path.rglob(f"*{SUFFIX}"))


def test_pages_of_the_host_pool(llama, folders, tmp_path):
    page = flat(*[side[:, :, :256] for side in llama[2:]], False)
    own, taken = storage(folders, tmp_path), {}
    own.mem_pool_host = SimpleNamespace(
        page_size=256,
        get_data_page=lambda index, flat: page * (index == 0),
        get_dummy_flat_data_page=lambda: torch.empty_like(page),
        set_from_flat_data_page=lambda index, made: taken.update({index: made}),
    )
    assert own.batch_set_v1(["a", "b"], torch.arange(512)) == [True, True]
    assert own.batch_get_v1(["a", "x", "b"], torch.arange(768)) == [True, False, True]
    assert sorted(taken) == [0, 512]
    own.clear()
    assert own.batch_exists(["a"]) == 0


def test_pages_of_another_size_come_back_as_they_were(folders, tmp_path):
    own, page = storage(folders, tmp_path), torch.randn(1001)
    assert own.set("a", page)
    assert torch.equal(own.get("a", torch.empty_like(page)), page)


def test_a_folder_that_somebody_removes_comes_back(folders, tmp_path):
    own, page = storage(folders, tmp_path / "pages"), torch.randn(1001)
    shutil.rmtree(tmp_path / "pages")
    assert own.set("a", page)
    assert torch.equal(own.get("a", torch.empty_like(page)), page)


def test_damaged_pages_that_cannot_be_removed_count_as_missing(folders, tmp_path, monkeypatch):
    own, page = storage(folders, tmp_path), torch.randn(1001)
    assert own.set("a", page)
    (path,) = tmp_path.rglob(f"*{SUFFIX}")
    path.write_bytes(path.read_bytes()[:-3])

    def refuse(*args, **kwargs):
        raise PermissionError("as in a folder of somebody else")

    monkeypatch.setattr("pathlib.Path.unlink", refuse)
    assert own.get("a", torch.empty_like(page)) is None


def test_what_is_not_supported_is_refused(folders, tmp_path):
    for changes in ({"tp_size": 2}, {"pp_size": 2}, {"is_mla_model": True}):
        with pytest.raises(UnsupportedModelError, match="does not support"):
            storage(folders, tmp_path, **changes)
    with pytest.raises(InputError, match="bundle must be"):
        storage(folders, tmp_path, extra_config={})
