"""The file of a stored context: written whole, and refused where it is damaged or claims what no cache can hold."""

import os
import random
import stat
from hashlib import sha256

import pytest
import torch
from bundles import exact
from containers import filled, laid_out, put_together, step, take_apart
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import tiny_model, token_ids

import kvcar
from kvcar.context import load_context, read_context, save_context
from kvcar.context.parts import is_sound
from kvcar.errors import ContextError, KVCarError
from kvcar.kernels.page_means import pack_means

DAMAGED = r"truncated or was changed|not a stored context|format version"


@pytest.fixture(scope="module")
def short(llama, tmp_path_factory):
    """A context of few tokens."""
    model, bundle = llama
    path = tmp_path_factory.mktemp("short") / "a.ctx"
    with kvcar.attach(model, bundle):
        save_context(filled(model, bundle, token_ids(3)), path, token_ids=token_ids(3))
    return path.read_bytes()


# Written whole


def test_the_container_is_the_documents_and_a_safetensors_file(saved):
    container = take_apart(saved.read_bytes())
    assert put_together(container) == saved.read_bytes()
    with safe_open(saved, "pt") as file:
        assert {name: file.get_tensor(name).numpy().tobytes() for name in container.payloads} == container.payloads
        assert bytes(file.get_tensor("sha256")) == sha256(saved.read_bytes()[:-32]).digest()


@pytest.mark.skipif(os.name == "nt", reason="modes of POSIX")
@pytest.mark.parametrize(("umask", "mode"), [(0o077, 0o600), (0o022, 0o644), (0o002, 0o664)])
def test_modes_follow_the_umask(llama, tmp_path, umask, mode):
    model, bundle = llama
    before = os.umask(umask)
    try:
        with kvcar.attach(model, bundle):
            save_context(filled(model, bundle, token_ids(3)), tmp_path / "a.ctx")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.ctx").stat().st_mode) == mode


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_an_interrupted_write_leaves_the_old_file(llama, tmp_path, monkeypatch, error, call):
    model, bundle = llama
    path = tmp_path / "a.ctx"
    path.write_text("old")

    def fail(*args, **kwargs):
        raise error

    with kvcar.attach(model, bundle):
        cache = filled(model, bundle, token_ids(3))
        monkeypatch.setattr(f"os.{call}", fail)
        with pytest.raises((ContextError, KeyboardInterrupt)):
            save_context(cache, path)
    assert [each.name for each in tmp_path.iterdir()] == ["a.ctx"]
    assert path.read_text() == "old"


# Damage


def test_every_changed_byte_is_noticed(short, tmp_path):
    path = tmp_path / "a.ctx"
    for place in range(len(short)):
        damaged = bytearray(short)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(ContextError, match=DAMAGED):
            read_context(path)
    path.write_bytes(short)
    assert read_context(path).header.tokens == 3


def test_every_truncation_is_noticed(short, tmp_path):
    path = tmp_path / "a.ctx"
    for kept in range(0, len(short), 7):
        path.write_bytes(short[:kept])
        with pytest.raises(ContextError, match=DAMAGED):
            read_context(path)
    path.write_bytes(short + b"\0")
    with pytest.raises(ContextError, match=DAMAGED):
        read_context(path)


def test_files_that_are_no_contexts(llama, tmp_path):
    for path in (tmp_path / "nothing", tmp_path, tmp_path / "a\0b"):
        with pytest.raises(ContextError, match="cannot read the context"):
            load_context(path, *llama)
    path = tmp_path / "a"
    for data in (
        b"",
        b"hello",
        b"hello, this is a text",
        bytes(100),
        b"\x10" + bytes(7) + b"{}" + b" " * 14 + bytes(32),
    ):
        path.write_bytes(data)
        with pytest.raises(ContextError, match=r"not a stored context|truncated or was changed"):
            read_context(path)
    save_file({"x": torch.zeros(100)}, path)
    with pytest.raises(ContextError, match="a safetensors file, but not a stored context"):
        read_context(path)
    path.write_bytes(b"KVCARCTX" + bytes(200))
    with pytest.raises(ContextError, match=r"format version 1.*save the context again"):
        read_context(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes of POSIX")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ContextError, match="not a regular file"):
        read_context(tmp_path / "pipe")


# Claims, with all checksums in order


def changed(data, change):
    container = take_apart(data)
    change(container)
    return put_together(container)


def entries(**changes):
    def change(c):
        c.entries = laid_out(c.payloads)
        c.entries["codes"].update(changes)

    return change


def nan_in(name, value):
    def change(c):
        part = next(part for part in c.header["parts"] if part["name"] == name)
        tensor = torch.zeros(part["shape"], dtype=getattr(torch, part["dtype"]))
        tensor.view(-1)[-1] = value
        c.replace(name, tensor)

    return change


def payload(name, make):
    return lambda c: c.payloads.update({name: make(c.payloads[name])})


def claim_tokens(c, tokens=50_000_000):
    c.header.update(tokens=tokens)
    c.header["parts"] = [part for part in c.header["parts"] if part["name"] == "token_ids"]
    c.payloads = {"token_ids": c.payloads["token_ids"]}
    c.header["parts"][0]["shape"] = [1, tokens]


FRAME_OF_4_TB = bytes.fromhex("28b52ffd c0 58") + (4 * 10**12).to_bytes(8, "little") + b"\x01\x00\x00"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.header.update(format_version=3), "version 3; this kvcar reads version 2"),
        (lambda c: c.header.update(format_version=2.0), r"version 2\.0; this kvcar reads version 2"),
        (lambda c: c.header.update({"\ud800": 1}), "header is no JSON"),
        (lambda c: c.header.update(surprise=1), "header does not fit at surprise"),
        (lambda c: c.header.update(tokens=-3), "header does not fit at tokens"),
        (lambda c: c.header.update(tokens=10**30), "header does not fit at tokens"),
        (lambda c: c.header.update(offset=[True]), "header does not fit at offset"),
        (lambda c: c.header.update(padding=[0, 0], offset=[0, 0]), "where this model needs"),
        (lambda c: c.header.update(offset=[0, 0]), "2 offsets for 1 sequences"),
        (lambda c: c.header.update(padding=[151]), "more padding than the 150 tokens"),
        (lambda c: c.header.update(offset=[1]), "tokens at negative positions"),
        (lambda c: c.header.update(padding=[4], offset=[5]), "tokens at negative positions"),
        (lambda c: c.header.update(offset=[-363]), "ends at position 513, but the model has 512"),
        (lambda c: c.header.update(tokens=1_000_000), "ends at position 1000000, but the model has 512"),
        (lambda c: c.header.update(window=33), "no multiple of the page size"),
        (lambda c: c.header.update(paged=149), "where this model needs"),
        (lambda c: c.header.update(tokens=151), "where this model needs"),
        (lambda c: c.header["parts"].pop(), "are not those of its header"),
        (lambda c: c.header["parts"].append(c.header["parts"][0]), "two parts of the same name"),
        (lambda c: c.header["parts"][0].update(name="sha256"), "of a name that has another use"),
        (lambda c: c.header["parts"][0].update(sha256="0" * 64), "does not decode to what was saved"),
        (lambda c: c.header["parts"][1].update(shape=[4, 2, 1, 2, 4, 17]), "where this model needs"),
        (lambda c: c.header["parts"][1].update(dtype="object"), "header does not fit"),
        (lambda c: c.header["parts"][1].update(shape=[2**31 - 1] * 8), "holds no more than"),
        (entries(shape=[1]), "do not add up"),
        (entries(shape=[-1], data_offsets=[0, -1]), "do not add up"),
        (entries(dtype="F32"), "do not add up"),
        (entries(data_offsets=[8, 16]), "do not add up"),
        (payload("codes", lambda data: data[:-1]), "words of 4 bytes"),
        (payload("exact", lambda _: FRAME_OF_4_TB), "does not hold"),
        (payload("exact", lambda _: b"nothing"), "cannot be decompressed"),
        (payload("exact", lambda data: data + b"more"), "cannot be decompressed"),
        *((nan_in("exact", value), "NaN, infinite values or numbers beyond .* in exact") for value in (torch.nan, -torch.inf, -3e38)),
    ],
)  # fmt: skip
def test_headers_and_parts_that_do_not_fit_are_refused(llama, saved, change, message):
    saved.write_bytes(changed(saved.read_bytes(), change))
    with pytest.raises(ContextError, match=message):
        load_context(saved, *llama)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (claim_tokens, "claims tensors of 200000000 bytes"),
        (lambda c: c.header["parts"][-1].update(shape=[150, 1]), r"token ids as int32 \[150, 1\]"),
        (lambda c: c.replace("token_ids", torch.full((1, 150), -1, dtype=torch.int32)), "negative token ids"),
    ],
)
def test_token_ids_are_checked_without_model_and_bundle(saved, change, message):
    saved.write_bytes(changed(saved.read_bytes(), change))
    with pytest.raises(ContextError, match=message):
        read_context(saved)


def test_coded_tokens_of_a_bundle_that_codes_none(tmp_path):
    model = tiny_model("llama")
    bundle, path = exact(model), tmp_path / "a.ctx"
    with kvcar.attach(model, bundle):
        save_context(filled(model, bundle, token_ids(20)), path)
    path.write_bytes(changed(path.read_bytes(), lambda c: c.header.update(paged=20)))
    with pytest.raises(ContextError, match="its bundle codes none"):
        load_context(path, model, bundle)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_numbers_beyond_all_reason_in_every_dtype(dtype, value):
    assert is_sound(torch.full((3,), 1000.0, dtype=dtype))
    assert is_sound(torch.zeros(0, dtype=dtype))
    assert not is_sound(torch.tensor([1.0, value], dtype=torch.float64).to(dtype))


def test_steps_of_means_that_are_no_numbers():
    means = pack_means(torch.randn(1, 2, 16))
    assert is_sound(means, "means.3")
    means[0, 1, :2] = torch.tensor([torch.nan], dtype=torch.float16).view(torch.uint8)
    assert not is_sound(means, "means.3")


# Whatever comes

VALUES = [
    None, True, 0, 1, -1, 2, 32, 149, 151, 512, 2**31 - 1, 2**31, 2**63, -(2**70), 1.5, "", "uint8", "float16", "zstd", "range",
    "codes", "exact", "plain.0", "raw.0", "token_ids", "\ud800", "0" * 64, [], [0], [1], [-5], [150], [0, 0], [4000], [2**40], {},
    {"name": "codes"},
]  # fmt: skip


def places(node):
    """Every (parent, key) below a JSON value."""
    for key in node if isinstance(node, dict) else range(len(node)):
        yield node, key
        if isinstance(node[key], dict | list):
            yield from places(node[key])


def mutate(container, rng):
    kind = rng.random()
    if kind < 0.15:
        name = rng.choice(list(container.payloads))
        data = bytearray(container.payloads[name])
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        container.payloads[name] = bytes(data[: rng.choice([len(data), len(data), rng.randrange(len(data))])])
        return
    if kind < 0.25:
        part = rng.choice([part for part in container.header["parts"] if part["coding"] == "zstd"])
        size = [max(0, n + rng.choice([-1, 0, 0, 0, 0, 0, 1])) for n in part["shape"]]
        noise = torch.randint(0, 2**16, size, generator=torch.Generator().manual_seed(rng.randrange(2**31)))
        container.replace(part["name"], noise.to(torch.int16).view(torch.bfloat16).to(getattr(torch, part["dtype"])))
        return
    if kind < 0.4:
        container.header.update(padding=[rng.randint(0, 160)], offset=[rng.randint(-400, 160)])
        return
    tree = container.header
    if kind < 0.5:
        tree = container.entries = laid_out(container.payloads)
    for _ in range(rng.choice([1, 1, 2])):
        node, key = rng.choice([(tree, rng.choice(list(tree))), rng.choice(list(places(tree)))])
        if rng.random() < 0.15:
            del node[key]
        elif isinstance(node[key], int) and rng.random() < 0.4:
            node[key] += rng.choice([-64, -32, -1, 1, 32, 64])
        else:
            node[key] = rng.choice(VALUES)


@pytest.mark.parametrize("seed", range(4))
def test_any_change_is_refused_or_loads(llama, saved_bytes, tmp_path, seed):
    """Headers, layouts and parts changed at random, checksums in order, end in an error of kvcar or a usable cache."""
    model, bundle = llama
    rng, path, loaded = random.Random(seed), tmp_path / "a.ctx", 0
    with kvcar.attach(model, bundle):
        for number in range(101):
            container = take_apart(saved_bytes)
            if number:  # the first is as it was saved: what follows is refused for its change, not for the test's ways
                mutate(container, rng)
            path.write_bytes(put_together(container))
            try:
                read_context(path)
                cache = load_context(path, model)
                logits = step(model, cache, token_ids(3))
            except KVCarError:
                continue
            header = read_context(path).header
            assert (cache.tokens, cache.batch_size) == (header.tokens + 3, len(header.padding))
            assert logits.isfinite().all()
            loaded += 1
    assert 1 <= loaded < 50
