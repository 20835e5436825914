"""Records: what the codec gives comes back, whatever the plan; sinks and costly pages exactly; bad ones are refused."""

import json
import shutil
import struct
import sys
from hashlib import sha256

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from record_pages import BUNDLES, coder_of, keys_of, limited, model_and_sides

from kvcar.errors import ContextError, InputError, KVCarError, UnsupportedModelError
from kvcar.serve.record_file import MAX_HEADER_BYTES, RecordKey, token_chain
from kvcar.serve.record_store import RecordStore
from kvcar.serve.records import decode_record, encode_record


def page(sides, index=0):
    return [side[:, :, 256 * index : 256 * (index + 1)] for side in sides]


def expected(coder, keys, values, position):
    """What the units' own codecs give back, unit by unit: another way through the same arithmetic."""
    before = {"key": coder.before_rope(keys, position), "value": values}
    found = {"key": torch.zeros_like(keys), "value": torch.zeros_like(values)}
    exact = {"key": keys, "value": values}
    made, first = {}, coder.plan.sinks if position == 0 else 0
    for unit in coder.pages.units:
        coded = unit.coded.codec is not None
        x = torch.cat([(before if coded else exact)[s.kind][s.layer, s.head] for s in unit.unit.slots], dim=-1)
        y = torch.cat([x[:first].float(), unit.coded.round_trip(x[first:].float())])
        for slot, own in zip(unit.unit.slots, y.split(coder.geometry.head_dim, dim=-1), strict=True):
            made[slot] = (own, coded)
    for slot, source in coder.plan.stored_source.items():
        if slot.layer in coder.plain_layers:
            found[slot.kind][slot.layer, slot.head] = exact[slot.kind][slot.layer, slot.head]
            continue
        own, coded = made[source]
        if slot.kind == "key" and coded:
            alone = torch.zeros_like(keys)
            alone[slot.layer, slot.head] = own
            own = coder.after_rope(alone, position)[slot.layer, slot.head]
        found[slot.kind][slot.layer, slot.head] = own
    if position == 0:
        for kind in found:
            layers, sinks = list(coder.plan.coded_layers), coder.plan.sinks
            found[kind][layers, :, :sinks] = exact[kind][layers, :, :sinks].to(coder.pages.dtype).float()
    return found["key"], found["value"]


@pytest.mark.parametrize("position", [0, 256, None], ids=str)
@pytest.mark.parametrize("name", BUNDLES)
def test_what_the_codec_gives_comes_back(llama, name, position):
    model, ids, *sides = llama
    coder = coder_of(model, BUNDLES[name](model))
    key = RecordKey(keys_of(coder, ids)[0].chain, position)
    keys, values = page(sides)
    found = decode_record(coder, encode_record(coder, keys, values, key), key)
    for own, wanted in zip(found, expected(coder, keys, values, position), strict=True):
        torch.testing.assert_close(own, wanted, atol=2e-3 if coder.pages.dtype == torch.float16 else 2e-5, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_lossless_record_gives_the_same_bits(dtype):
    model, ids, *sides = model_and_sides(dtype=dtype)
    for name in ("lossless", "nothing-coded"):
        coder = coder_of(model, BUNDLES[name](model.float()), dtype)
        model.to(dtype)
        key = keys_of(coder, ids)[0]
        found = decode_record(coder, encode_record(coder, *page(sides), key), key)
        assert all(torch.equal(own, side) for own, side in zip(found, page(sides), strict=True))


@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 63, 255])
def test_pages_that_are_not_full(llama, coder, key, tokens):
    sides = [side[:, :, :tokens] for side in llama[2:]]
    for own, wanted in zip(
        decode_record(coder, encode_record(coder, *sides, key), key), expected(coder, *sides, 0), strict=True
    ):
        torch.testing.assert_close(own, wanted, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("family", ["gpt2", "mistral", "qwen2", "qwen3"])
def test_families(family):
    model, ids, *sides = model_and_sides(family)
    coder = coder_of(model, BUNDLES["lossless"](model))
    key = keys_of(coder, ids)[0]
    found = decode_record(coder, encode_record(coder, *page(sides), key), key)
    for own, side in zip(found, page(sides), strict=True):
        torch.testing.assert_close(own, side, atol=2e-3, rtol=2e-3)


def test_a_model_with_sliding_windows_is_refused():
    model = model_and_sides("gemma3", tokens=8)[0]
    with pytest.raises(UnsupportedModelError, match="all layers"):
        coder_of(model, BUNDLES["fitted"](model))


def test_codes_take_less_than_what_they_are_of(record, coder):
    assert len(record) < 256 * coder.geometry.full_bytes(1) / 2.5


def test_noise_is_written_and_read(coder, key, noise):
    for position in (0, None):
        own = RecordKey(key.chain, position)
        found = decode_record(coder, encode_record(coder, *noise, own), own)
        assert all(torch.isfinite(side).all() for side in found)


def test_a_page_that_would_cost_too_much_is_exact(llama):
    model, ids, *sides = llama
    bundle = BUNDLES["stored"](model)
    for limit, same in ((1e9, False), (1e-9, True)):
        coder = coder_of(model, limited(bundle, limit))
        key = keys_of(coder, ids)[0]
        _, values = decode_record(coder, encode_record(coder, *page(sides), key), key)
        assert torch.equal(values, page(sides)[1].to(coder.pages.dtype).float()) == same


# What records are asked for by


def test_chains_depend_on_all_tokens_before_the_model_the_bundle_and_the_salt():
    ids = list(range(600))
    keys = token_chain(ids, "f", "d")
    assert [key.position for key in keys] == [0, 256]
    assert token_chain(ids[:512], "f", "d") == keys
    assert len({key.chain for other in (token_chain([5, *ids[1:]], "f", "d"), token_chain(ids, "g", "d"), token_chain(ids, "f", "e"), token_chain(ids, "f", "d", b"s"), keys) for key in other}) == 10  # fmt: skip
    assert token_chain([*ids[:300], 7, *ids[301:]], "f", "d")[0] == keys[0]
    assert token_chain(ids[:255], "f", "d") == token_chain([], "f", "d") == []


@pytest.mark.parametrize("ids", [[-1] * 256, [2**31] * 256, [[1] * 256]], ids=["negative", "large", "nested"])
def test_ids_that_are_none_are_refused(ids):
    with pytest.raises(InputError, match="token ids"):
        token_chain(ids, "f", "d")


# What is no record of this


@pytest.mark.parametrize("change", ["text", "position", "bundle", "dtype", "model"])
def test_foreign_records_are_refused(llama, coder, key, record, change):
    model, ids = llama[:2]
    if change == "text":
        key = keys_of(coder, ids.flip(1))[0]
    elif change == "position":
        key = key._replace(position=256)
    elif change == "bundle":
        coder = coder_of(model, BUNDLES["lossless"](model))
    elif change == "dtype":
        coder = coder_of(model, coder.bundle, torch.bfloat16)
    else:
        other = model_and_sides(seed=5, tokens=8)[0]
        coder = coder_of(other, BUNDLES["fitted"](other))
    with pytest.raises(ContextError, match="of no use here"):
        decode_record(coder, record, key)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2.0**31], ids=str)
def test_what_no_record_holds_is_refused(llama, coder, key, value):
    keys, values = (side.clone() for side in page(llama[2:]))
    values[3, 1, 100, 7] = value
    with pytest.raises(InputError, match="NaN, infinite"):
        encode_record(coder, keys, values, key)


def test_other_shapes_are_refused(llama, coder, key):
    keys, values = llama[2:]
    for own in ((keys, values), (keys[:3, :, :256], values[:3, :, :256]), (keys[:, :, :0],) * 2, (keys[0], values[0])):
        with pytest.raises(InputError, match="a record of this model takes"):
            encode_record(coder, *own, key)


def test_without_the_library_it_says_what_to_install(llama, coder, key, monkeypatch):
    monkeypatch.setitem(sys.modules, "constriction", None)
    with pytest.raises(InputError, match=r"kvcar\[store\]"):
        encode_record(coder, *page(llama[2:]), key)


# Damage


def test_every_changed_byte_is_noticed(record, coder, key):
    for place in range(0, len(record), 101):
        damaged = bytearray(record)
        damaged[place] ^= 1 << place % 8
        with pytest.raises(ContextError):
            decode_record(coder, damaged, key)


def test_every_truncation_is_noticed(record, coder, key):
    for kept in range(0, len(record), 997):
        with pytest.raises(ContextError):
            decode_record(coder, record[:kept], key)
    with pytest.raises(ContextError):
        decode_record(coder, record + b"\0", key)


def fields(data):
    (size,) = struct.unpack_from("<I", data, 8)
    return json.loads(data[12 : 12 + size]), data[12 + size : -32]


def signed(header, body):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    data = b"KVCARREC" + struct.pack("<I", len(text)) + text + body
    return data + sha256(data).digest()


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damage_with_all_checksums_in_order_is_refused_or_gives_numbers(record, coder, key, data):
    """Whoever writes checksums may write anything: nothing but kvcar's errors comes of it, and no NaN."""
    header, body = fields(record)
    body = bytearray(body)
    for _ in range(data.draw(st.integers(0, 3))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    for _ in range(data.draw(st.integers(0, 2))):
        part = data.draw(st.sampled_from(header["parts"]))
        name = data.draw(st.sampled_from(sorted(part)))
        part[name] = data.draw(
            st.sampled_from([part[name], 0, -1, 2**31, 10**30, "", "codes", None, [], [2**31 - 1] * 8, "0" * 64, 1.5])
        )
    name = data.draw(st.sampled_from(sorted(header)))
    if data.draw(st.booleans()):
        header[name] = data.draw(st.sampled_from([0, -1, 7, 2**40, None, "", [], {}, True]))
    try:
        found = decode_record(coder, signed(header, bytes(body)), key)
    except KVCarError:
        return
    assert all(torch.isfinite(side).all() for side in found)


@pytest.mark.parametrize(
    "codes_change", [lambda c: bytes(len(c)), lambda c: b"\xff" * len(c), lambda c: c[:-4] + bytes(4)]
)
def test_codes_that_decode_to_something_else_are_noticed(record, coder, key, codes_change):
    header, body = fields(record)
    pieces, start = [], 0
    for part in header["parts"]:
        own = body[start : start + part["size"]]
        start += part["size"]
        pieces.append(codes_change(own) if part["name"] == "codes" else own)
    if b"".join(pieces) == body:
        pytest.skip("the change changes nothing")
    with pytest.raises(ContextError):
        decode_record(coder, signed(header, b"".join(pieces)), key)


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b'{"format_version": 2}', b"[" * 100_000, b"\xff", b'{"format_version": 1}', b'{"format_version": 1, "\\ud800": 1}'], ids=lambda t: t[:20])  # fmt: skip
def test_headers_that_are_none(coder, key, text):
    with pytest.raises(ContextError):
        decode_record(coder, signed(text, b""), key)


def test_a_header_beyond_all_measure(coder, key):
    with pytest.raises(ContextError, match="longer than the record"):
        decode_record(coder, signed(b" " * (MAX_HEADER_BYTES + 1), b""), key)


# Folders


def test_a_folder_that_somebody_removes_comes_back(llama, coder, key, tmp_path):
    store = RecordStore(tmp_path / "records", coder)
    assert store.write(key, *page(llama[2:]))
    shutil.rmtree(tmp_path / "records")
    assert not store.holds(key)
    assert store.write(key, *page(llama[2:]))
    assert store.holds(key)


def test_a_bad_record_is_looked_at_once_until_it_is_written_again(llama, coder, key, record, tmp_path, caplog):
    store = RecordStore(tmp_path, coder)
    path = store.path(key)
    path.parent.mkdir()
    path.write_bytes(record[:-1])
    assert [store.holds(key) for _ in range(3)] == [False] * 3
    assert len(caplog.records) == 1
    path.write_bytes(record)
    assert store.holds(key)
    path.write_bytes(record[:-2])
    assert not store.holds(key)
    assert store.write(key, *page(llama[2:]))
    assert store.holds(key)
