"""The C kernel of attention against the specification; its 8-bit decoders; how it is compiled."""

import gc
import os
import platform
from pathlib import Path

import pytest
import torch
from bundles import by_hand
from structures import HEAD_DIM, MODEL, STRUCTURES, paged_past, slots
from tiny import tiny_model

from kvcar.cache.coder import PageCoder
from kvcar.errors import KernelError
from kvcar.kernels.attend import Buffered, ExactPast, attend, cpu, naive
from kvcar.kernels.attend.cpu_decoders import decoder_in_8_bits, latent_bits
from kvcar.kernels.native import build, find_compiler, native_library
from kvcar.kernels.rotary import RotaryTable

UNSUPPORTED = {"raw latents", "values exact", "one key head exact", "autoencoder", "lossless"}


@pytest.fixture(scope="module", params=list(STRUCTURES), ids=str)
def structure(request):
    return request.param, PageCoder(STRUCTURES[request.param](), torch.device("cpu"), torch.float32)


def rotary(style, pairs=8, scale=1.0):
    return RotaryTable(1.0 / 10000 ** (torch.arange(pairs, dtype=torch.float64) / 8), scale, style)


def exact_past(count, dtype=torch.float32):
    mask = torch.ones(count, 5 + count, dtype=torch.bool).tril(5)[None, None].expand(2, -1, -1, -1)
    return ExactPast(
        torch.randn(2, 2, 5 + count, HEAD_DIM).to(dtype), torch.randn(2, 2, 5 + count, HEAD_DIM).to(dtype), mask
    )


OLDER = ("avx512vnni", "avx512bw", "avx512f", "avx2") if platform.machine() in ("x86_64", "AMD64") else ()


def compilers():
    """The one that is taken here, and the other of gcc and clang where it is installed too."""
    found = {}
    for one in (find_compiler(), build.compiler_at("gcc"), build.compiler_at("clang")):
        if one is not None:
            found.setdefault(Path(one.path).resolve(), one)
    return list(found.values())


@pytest.fixture(
    params=[(compiler, lacking) for compiler in compilers() for lacking in ("all", *OLDER)],
    ids=lambda param: f"{Path(param[0].path).name} {param[1]}",
)
def without(request, monkeypatch, tmp_path_factory):
    """Kernels as CPUs get them that lack one of this one's sets of instructions, by each compiler."""
    compiler, lacking = request.param
    monkeypatch.setenv("KVCAR_KERNEL_CACHE", str(tmp_path_factory.getbasetemp() / "kernels"))
    monkeypatch.setattr(build, "find_compiler", lambda: compiler)
    if lacking != "all":
        own = (*build._architecture_flags(), f"-mno-{lacking}")
        monkeypatch.setattr(build, "_architecture_flags", lambda: own)
    build.native_library.cache_clear()
    yield lacking
    build.native_library.cache_clear()


ROTARIES = {
    "half": lambda: rotary("half"),
    "interleaved, some elements, scaled": lambda: rotary("interleaved", 6, 1.3),
    "none": lambda: None,
}


@pytest.mark.parametrize("turning", ROTARIES)
@pytest.mark.parametrize(("tokens", "count"), [(1, 1), (33, 1), (63, 7), (1000, 1), (1000, 3)])
def test_it_is_the_specification(structure, tokens, count, turning):
    name, coder = structure
    paged = paged_past(coder, 1, tokens, 2, ROTARIES[turning](), [0, min(9, tokens - 1)])
    query, exact = torch.randn(2, 4, count, HEAD_DIM), exact_past(count)
    reason = cpu.unsupported(query, paged)
    assert (reason is not None) == (name in UNSUPPORTED)
    if reason is not None:
        with pytest.raises(KernelError, match="cannot be used"):
            cpu.attend(query, exact, paged, 0.25)
        return
    for softcap in (None, 5.0):
        expected = naive.attend(query, exact, paged, 0.25, softcap)
        torch.testing.assert_close(cpu.attend(query, exact, paged, 0.25, softcap), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("query_heads", [2, 6, 10])
@pytest.mark.parametrize("head_dim", [16, 64, 96])
def test_older_cpus_get_the_same(without, head_dim, query_heads):
    """Vectors of all widths, filled or not, and rests: of elements, latents, query rows and tokens."""
    model = tiny_model("llama", head_dim=head_dim, hidden_size=60, num_attention_heads=query_heads)
    bundle = by_hand(model, [slots([0], "key", [0]), slots([0], "key", [1]), slots([0], "value")], bits=[8, 7, 5, 3, 2])
    coder = PageCoder(bundle, torch.device("cpu"), torch.float32)
    turning = RotaryTable(1.0 / 10000 ** (torch.arange(head_dim // 2, dtype=torch.float64) / head_dim * 2), 1.0, "half")
    paged = paged_past(coder, 0, 333, 2, turning, [0, 5], head_dim)
    query, new = torch.randn(2, query_heads, 1, head_dim), torch.randn(2, 2, 2, 6, head_dim)
    exact = ExactPast(new[0], new[1], None)
    expected = naive.attend(query, exact, paged, 0.125)
    torch.testing.assert_close(cpu.attend(query, exact, paged, 0.125), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("page_tokens", [64, 96, 128, 256])
def test_pages_of_several_tiles(without, page_tokens):
    """Tiles that begin amid a byte's tokens or are not filled; sequences that begin or end in any tile of a page."""
    bundle = by_hand(
        MODEL,
        [slots(range(4), "key"), slots(range(4), "value")],
        bits=[8, 7, 5, 3, 2],
        page_tokens=page_tokens,
        window=page_tokens * 2,
    )
    coder = PageCoder(bundle, torch.device("cpu"), torch.float32)
    query, exact = torch.randn(2, 4, 1, HEAD_DIM), exact_past(1)
    for tokens in (3 * page_tokens - 1, 5 * page_tokens + 33, 6 * page_tokens):
        for turning in (rotary("half"), None):
            paged = paged_past(coder, 1, tokens, 2, turning, [0, 70])
            expected = naive.attend(query, exact, paged, 0.25)
            torch.testing.assert_close(cpu.attend(query, exact, paged, 0.25), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes(dtype):
    coder = PageCoder(STRUCTURES["heads apart"](), torch.device("cpu"), dtype)
    paged = paged_past(coder, 0, 200, 2, rotary("half"), [0, 40])
    query, exact = torch.randn(2, 4, 1, HEAD_DIM).to(dtype), exact_past(1, dtype)
    got, expected = cpu.attend(query, exact, paged, 0.25), naive.attend(query, exact, paged, 0.25)
    assert got.dtype == dtype
    torch.testing.assert_close(got, expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_and_arenas_do_not_matter(threads):
    coder = PageCoder(STRUCTURES["blocks over layers"](), torch.device("cpu"), torch.float32)
    paged = paged_past(coder, 2, 3000, 1, rotary("half"), [0])
    assert len(paged.tiles) > 2
    query, exact = torch.randn(1, 4, 1, HEAD_DIM), ExactPast(torch.randn(1, 2, 3, 16), torch.randn(1, 2, 3, 16), None)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = cpu.attend(query, exact, paged, 0.25)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(got, naive.attend(query, exact, paged, 0.25), atol=2e-5, rtol=2e-5)


def test_its_threads_are_torchs_own(without):
    """With a runtime of its own the kernel's threads would stand beside torch's, and wait for work at their cost."""
    coder = PageCoder(STRUCTURES["heads apart"](), torch.device("cpu"), torch.float32)
    paged, query = paged_past(coder, 0, 500, 2, rotary("half"), [0, 5]), torch.randn(2, 4, 1, HEAD_DIM)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        torch.ones(2**20).exp()
        threads = set(os.listdir("/proc/self/task"))
        cpu.attend(query, exact_past(1), paged, 0.25)
        assert set(os.listdir("/proc/self/task")) == threads
    finally:
        torch.set_num_threads(before)


def test_sinks_and_window_are_read_where_they_lie():
    coder = PageCoder(STRUCTURES["heads apart"](), torch.device("cpu"), torch.float32)
    paged = paged_past(coder, 0, 100, 2, rotary("half"), [0, 5])
    room = torch.randn(2, 2, 2, 40, HEAD_DIM).bfloat16()
    before = Buffered(room[0], room[1], 3, 20)  # as a window's buffers are
    new = torch.randn(2, 2, 2, 2, HEAD_DIM)
    mask = torch.rand(2, 1, 2, 19) < 0.7
    exact, query = ExactPast(new[0], new[1], mask, before), torch.randn(2, 4, 2, HEAD_DIM)
    expected = naive.attend(query, exact, paged, 0.25)
    torch.testing.assert_close(cpu.attend(query, exact, paged, 0.25), expected, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(attend(query, exact, paged, 0.25), expected, atol=2e-5, rtol=2e-5)


def test_what_one_step_set_does_not_linger_in_the_next():
    """Places are kept from step to step: other buffers, ranges, pages, batches and threads must all be noticed."""
    coder = PageCoder(STRUCTURES["heads apart"](), torch.device("cpu"), torch.float32)
    turning = rotary("half")
    pasts = [paged_past(coder, 0, tokens, 2, turning, [0, 5]) for tokens in (100, 200)]
    rooms = [torch.randn(2, 2, 2, 40, HEAD_DIM).to(dtype) for dtype in (torch.bfloat16, torch.float32, torch.float16)]
    before = torch.get_num_threads()
    try:
        for step in range(24):
            torch.set_num_threads(1 + step % 2)
            room, paged = rooms[step // 4 % 3], pasts[step // 3 % 2]
            past = None if step % 7 == 6 else Buffered(room[0], room[1], step % 3, 9 + step)
            new = torch.randn(2, 2, 2, 1 + step % 2, HEAD_DIM)
            exact, query = ExactPast(new[0], new[1], None, past), torch.randn(2, 4, 1, HEAD_DIM)
            expected = naive.attend(query, exact, paged, 0.25)
            torch.testing.assert_close(cpu.attend(query, exact, paged, 0.25), expected, atol=2e-5, rtol=2e-5)
    finally:
        torch.set_num_threads(before)


def test_places_of_buffers_and_pages_that_are_gone_are_not_read():
    coder = PageCoder(STRUCTURES["heads apart"](), torch.device("cpu"), torch.float32)
    turning, query = rotary("half"), torch.randn(2, 4, 1, HEAD_DIM)
    for tokens in (100, 164, 100, 228):
        paged, room = paged_past(coder, 0, tokens, 2, turning, [0, 5]), torch.randn(2, 2, 2, 40, HEAD_DIM)
        new = torch.randn(2, 2, 2, 1, HEAD_DIM)
        exact = ExactPast(new[0], new[1], None, Buffered(room[0], room[1], 0, 9))
        expected = naive.attend(query, exact, paged, 0.25)
        torch.testing.assert_close(cpu.attend(query, exact, paged, 0.25), expected, atol=2e-5, rtol=2e-5)
        del paged, room, exact
        gc.collect()


def test_unfilled_room_and_old_scratch_are_never_read(monkeypatch):
    coder = PageCoder(STRUCTURES["heads apart"](), torch.device("cpu"), torch.float32)
    paged = paged_past(coder, 0, 40, 1, rotary("half"), [0])
    query, exact = torch.randn(1, 4, 1, HEAD_DIM), ExactPast(torch.randn(1, 2, 1, 16), torch.randn(1, 2, 1, 16), None)
    before = cpu.attend(query, exact, paged, 0.25)
    for arena in paged.tiles:
        arena[:, 2:] = 255  # 40 tokens fill one page and part of the second
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))
    assert torch.equal(cpu.attend(query, exact, paged, 0.25), before)


def test_a_query_that_sees_nothing_gives_zeros():
    coder = PageCoder(STRUCTURES["heads apart"](), torch.device("cpu"), torch.float32)
    paged = paged_past(coder, 0, 3, 1, rotary("half"), [0])  # all of them sinks
    nothing = ExactPast(torch.randn(1, 2, 3, 16), torch.randn(1, 2, 3, 16), torch.zeros(1, 1, 2, 3, dtype=torch.bool))
    assert torch.equal(cpu.attend(torch.randn(1, 4, 2, 16), nothing, paged, 1.0), torch.zeros(1, 4, 2, 16))


def latents_together(without):
    """Latents that 8-bit decoders multiply at once here without a set: 4 with AVX-512's dot products, 2 with AVX2."""
    has = set(build._cpu().split())  # as Linux names them; of other CPUs there is nothing of the kind among it
    if "avx2" not in has or without == "avx2":
        return 0
    return 4 if "avx512_vnni" in has and without not in ("avx512vnni", "avx512f") else 2


@pytest.mark.parametrize("page_tokens", [32, 128])
@pytest.mark.parametrize("bits", [[8, 7, 6, 5], [5, 5, 4, 3, 2, 1], [4]], ids=str)
def test_decoders_in_8_bits_change_keys_by_what_they_say(bits, page_tokens, without, monkeypatch):
    blocks = [slots([i], k) for i in range(4) for k in ("key", "value")]
    bundle = by_hand(MODEL, blocks, bits=bits, page_tokens=page_tokens, window=page_tokens)
    coder = PageCoder(bundle, torch.device("cpu"), torch.float32)
    paged = paged_past(coder, 1, 500, 2, rotary("half"), [0, 5])
    query, exact = torch.randn(2, 4, 1, HEAD_DIM), exact_past(1)
    monkeypatch.setattr(cpu, "IN_8_BITS", True)
    # The same rounding, done in floats, must give the same output.
    reader = paged.key_readers[0]
    matrix, bias = reader.affine
    rounded, biases = matrix.clone(), bias.clone()
    together = native_library().kvcar_decode8_latents()  # nothing is rounded where it is 0
    assert together == latents_together(without)
    for head in range(len(reader.heads) if together else 0):
        own = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
        decoder = decoder_in_8_bits(matrix[:, own], bias[own], latent_bits(reader.segment))
        rounded[decoder.exact :, own] = decoder.rounded.float() * decoder.scale
        biases[own] = decoder.bias
    expected = naive.attend(query, exact, with_keys(paged, rounded, biases), 0.25)
    torch.testing.assert_close(cpu.attend(query, exact, paged, 0.25), expected, atol=2e-4, rtol=2e-4)


def with_keys(paged, matrix, bias):
    """The same past with another decoder of keys."""
    from dataclasses import replace

    reader = replace(paged.key_readers[0], affine=(matrix, bias), decode=lambda u: u @ matrix + bias)
    return replace(paged, key_readers=(reader,))


def test_rounding_decoders_adds_little_to_the_codes_own_noise():
    draw = torch.Generator().manual_seed(0)
    bits = torch.tensor([8, 7, 6, 6, 5, 5, 5, *[4] * 16, *[3] * 20, *[2] * 15])
    # Water-filling gives all latents about the same step; directions are orthonormal.
    matrix = torch.linalg.qr(torch.randn(64, 64, generator=draw))[0][: len(bits)]
    decoder = decoder_in_8_bits(matrix, torch.zeros(64), bits)
    assert decoder.exact == 1
    codes = (torch.rand(4000, len(bits), generator=draw) * (2.0**bits - 1)).round()
    exact = codes @ matrix
    rounded = codes[:, :1] @ matrix[:1] + (codes[:, 1:] @ decoder.rounded.float()) * decoder.scale + decoder.bias
    noise = (torch.rand(4000, len(bits), generator=draw) - 0.5) @ matrix
    assert (rounded - exact).square().mean() < 0.06 * noise.square().mean()


def test_sums_of_16_bits_cannot_overflow():
    draw = torch.Generator().manual_seed(1)
    bits = torch.tensor([6] * 40 + [5] * 30 + [1] * 31)
    decoder = decoder_in_8_bits(torch.randn(101, 16, generator=draw), torch.zeros(16), bits)
    highest, start = 2**bits - 1, 0
    for stop in decoder.stops:
        own = decoder.rounded[2 * start : 2 * stop].long() * highest[2 * start : 2 * stop, None]
        assert own.clamp_min(0).sum(0).max() <= 32767
        assert (-own).clamp_min(0).sum(0).max() <= 32767
        start = stop
    assert 2 * start >= 101
