"""The C kernel of attention against the specification; its 8-bit decoders; how it is compiled."""

import gc
import os
import platform
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bundles import by_hand
from structures import HEAD_DIM, MODEL, STRUCTURES, paged_past, slots
from tiny import tiny_model

from kvcar.cache.coder import PageCoder
from kvcar.errors import KernelError
from kvcar.kernels.attend import Buffered, ExactPast, RoundedDecoder, attend, cpu, naive, tiled
from kvcar.kernels.attend.cpu_decoders import decoder_in_8_bits, latent_bits, widening_stops
from kvcar.kernels.native import build, find_compiler
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


OLDER = ("avx512vnni", "avx512bw", "avx512f", "avx2", "ssse3") if platform.machine() in ("x86_64", "AMD64") else ()


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


@pytest.mark.parametrize("backend", ["cpu", "torch", "naive"])
@pytest.mark.parametrize("count", [1, 40])
def test_pages_that_lie_in_no_order_are_the_same(backend, count):
    coder = PageCoder(STRUCTURES["blocks over layers"](), torch.device("cpu"), torch.float32)
    paged = paged_past(coder, 0, 300, 2, rotary("half"), [0, 9])
    pages = torch.cat(list(paged.tiles), dim=1)
    # All sequences' pages in one pool among others, wider than a page, as an engine has them.
    places = torch.randperm(pages[..., 0].numel() + 5, generator=torch.Generator().manual_seed(1))[
        : pages[..., 0].numel()
    ]
    pool = torch.full((1, len(places) + 5, pages.shape[2] + 48), 255, dtype=torch.uint8)[..., : pages.shape[2]]
    pool[0, places] = pages.flatten(0, 1)
    scattered = replace(paged, tiles=[pool], table=places.view(pages.shape[:2]))
    query, exact = torch.randn(2, 4, count, HEAD_DIM), exact_past(count)
    expected = attend(query, exact, paged, 0.3, backend=backend)
    assert torch.equal(attend(query, exact, scattered, 0.3, backend=backend), expected)


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
    sinks = torch.linspace(-2, 3, query.shape[1])
    expected = naive.attend(query, exact, paged, 0.25, None, sinks)
    torch.testing.assert_close(cpu.attend(query, exact, paged, 0.25, None, sinks), expected, atol=2e-5, rtol=2e-5)


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


@pytest.mark.parametrize("kernel", [cpu.attend, tiled.attend], ids=["cpu", "torch"])
def test_pages_are_read_up_to_where_they_are_shown(kernel):
    coder = PageCoder(STRUCTURES["heads apart"](), torch.device("cpu"), torch.float32)
    paged = paged_past(coder, 0, 230, 2, rotary("half"), [0, 5])
    new, query = torch.randn(2, 2, 2, 1, HEAD_DIM), torch.randn(2, 4, 1, HEAD_DIM)
    exact = ExactPast(new[0], new[1], None)
    outputs = []
    for shown in (None, [[32, 0, 7, 32, 32, 32, 32, 0], [0, 0, 32, 31, 1, 32, 32, 32]], [[0] * 8] * 2):
        past = replace(paged, shown=None if shown is None else torch.tensor(shown))
        expected = naive.attend(query, exact, past, 0.25)
        torch.testing.assert_close(kernel(query, exact, past, 0.25), expected, atol=2e-5, rtol=2e-5)
        outputs.append(expected)
    assert (outputs[0] - outputs[1]).abs().max() > 1e-2
    torch.testing.assert_close(outputs[2], naive.attend(query, exact, None, 0.25))


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


def with_decoders(paged, change):
    """The same past with other readers."""
    return replace(
        paged,
        key_readers=tuple(map(change, paged.key_readers)),
        value_readers=tuple(map(change, paged.value_readers)),
    )


def in_8_bits(reader, head_dim=HEAD_DIM):
    """Round as the kernel does."""
    return decoder_in_8_bits(*reader.affine, latent_bits(reader.segment), head_dim)


def as_floats(decoder):
    """The same decoder as matrix and bias."""
    by_latent = decoder.decoder.float().permute(1, 3, 0, 2).flatten(0, 1).flatten(1) * decoder.scale
    return torch.cat([decoder.exact.float(), by_latent]), decoder.bias


def rounded_in_floats(reader, head_dim=HEAD_DIM):
    """The same rounding, to be multiplied in floats."""
    matrix, bias = as_floats(reader.rounded or in_8_bits(reader, head_dim))
    matrix = matrix[: reader.segment.latents]
    return replace(reader, affine=(matrix, bias), decode=lambda u: u @ matrix + bias)


# Sums of values round their weights to 2^-15 of a tile's largest.
SUMS = {"atol": 2e-4, "rtol": 2e-4}
TURNINGS = {**ROTARIES, "half, some elements": lambda: rotary("half", 6)}


@pytest.mark.parametrize("page_tokens", [32, 128])
@pytest.mark.parametrize("bits", [[8, 7, 6, 5], [5, 5, 4, 3, 2, 1], [4], [8, 8]], ids=str)
def test_products_in_integers_are_those_of_rounded_decoders(bits, page_tokens, without, monkeypatch):
    blocks = [slots([i], k) for i in range(4) for k in ("key", "value")]
    bundle = by_hand(MODEL, blocks, bits=bits, page_tokens=page_tokens, window=page_tokens)
    coder = PageCoder(bundle, torch.device("cpu"), torch.float32)
    monkeypatch.setattr(cpu, "IN_8_BITS", True)
    for turning in TURNINGS.values():
        paged = paged_past(coder, 1, 500, 2, turning(), [0, 5])
        for count in (1, 3):
            query, exact = torch.randn(2, 4, count, HEAD_DIM), exact_past(count)
            expected = naive.attend(query, exact, with_decoders(paged, rounded_in_floats), 0.25)
            torch.testing.assert_close(cpu.attend(query, exact, paged, 0.25), expected, **SUMS)


@pytest.mark.parametrize("query_heads", [2, 6, 10])
@pytest.mark.parametrize("head_dim", [16, 64, 96])
def test_heads_and_blocks_of_all_sizes_in_integers(without, head_dim, query_heads, monkeypatch):
    """Keys and values of two layers in one block; rests of vectors, latents, query rows and tokens."""
    monkeypatch.setattr(cpu, "IN_8_BITS", True)
    model = tiny_model("llama", head_dim=head_dim, hidden_size=60, num_attention_heads=query_heads)
    bundle = by_hand(model, [slots([0, 1], "key") + slots([0, 1], "value")], bits=[8, 8, 7, 5, 3, 2, 1])
    coder = PageCoder(bundle, torch.device("cpu"), torch.float32)
    turning = RotaryTable(1.0 / 10000 ** (torch.arange(head_dim // 2, dtype=torch.float64) / head_dim * 2), 1.0, "half")
    paged = paged_past(coder, 1, 333, 2, turning, [0, 5], head_dim)
    query, new = torch.randn(2, query_heads, 1, head_dim), torch.randn(2, 2, 2, 6, head_dim)
    exact = ExactPast(new[0], new[1], None)
    expected = naive.attend(query, exact, with_decoders(paged, lambda r: rounded_in_floats(r, head_dim)), 0.125)
    torch.testing.assert_close(cpu.attend(query, exact, paged, 0.125), expected, **SUMS)


@pytest.mark.parametrize("turning", TURNINGS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16], ids=str)
def test_decoders_that_are_in_8_bits_are_read_where_they_lie(dtype, turning):
    """Those of a block's heads, of which a layer has some."""
    head_dim = 64
    model = tiny_model("llama", head_dim=head_dim, hidden_size=60)
    bundle = by_hand(model, [slots([0, 1], "key") + slots([0, 1], "value")], bits=[8, 7, 5, 3, 2])
    coder = PageCoder(bundle, torch.device("cpu"), torch.float32)
    pairs = {"half": 32, "interleaved, some elements, scaled": 20, "half, some elements": 20}
    own = rotary("interleaved" if "inter" in turning else "half", pairs[turning]) if turning in pairs else None
    paged = paged_past(coder, 1, 333, 2, own, [0, 5], head_dim)

    def in_memory(reader):
        """As a slice of a block's decoder that is twice as wide."""
        decoder, width = in_8_bits(reader, head_dim), 2 * head_dim
        exact = torch.cat([decoder.exact, decoder.exact], 1).to(dtype)[:, width:]
        wide = torch.cat([decoder.decoder, decoder.decoder])[2:]
        return replace(reader, rounded=RoundedDecoder(exact, wide, decoder.scale, decoder.bias), affine=None)

    stored = with_decoders(paged, in_memory)
    query, exact = torch.randn(2, 4, 1, head_dim), ExactPast(*torch.randn(2, 2, 2, 3, head_dim), None)
    expected = naive.attend(query, exact, with_decoders(stored, lambda r: rounded_in_floats(r, head_dim)), 0.25)
    torch.testing.assert_close(cpu.attend(query, exact, stored, 0.25), expected, atol=2e-5, rtol=2e-5)
    values = cpu._job(stored, query)._decoders.values[0]
    decoder = stored.value_readers[0].rounded
    places = decoder.decoder.data_ptr(), decoder.scale.data_ptr(), decoder.bias.data_ptr()
    assert (values.decoder, values.scale, values.bias) == places
    if dtype != torch.bfloat16:
        assert decoder.exact.data_ptr() == (values.half if dtype == torch.float16 else values.matrix)


def test_rounding_decoders_adds_little_to_the_codes_own_noise():
    draw = torch.Generator().manual_seed(0)
    bits = torch.tensor([8, 7, 6, 6, 5, 5, 5, *[4] * 16, *[3] * 20, *[2] * 15])
    # Water-filling gives all latents about the same step; directions are orthonormal.
    matrix = torch.linalg.qr(torch.randn(64, 64, generator=draw))[0][: len(bits)]
    decoder = decoder_in_8_bits(matrix, torch.zeros(64), bits, 64)
    assert len(decoder.exact) == 1
    codes = (torch.rand(4000, len(bits), generator=draw) * (2.0**bits - 1)).round()
    rounded, bias = as_floats(decoder)
    noise = (torch.rand(4000, len(bits), generator=draw) - 0.5) @ matrix
    error = codes @ rounded[: len(bits)] + bias - codes @ matrix
    assert error.square().mean() < 0.06 * noise.square().mean()


@pytest.mark.parametrize(
    "bits", [[7] * 9, [7, 6, 6, 5, 4, 3, 2, 1], [6] * 40 + [5] * 30 + [1] * 31, [1] * 2000], ids=str
)
def test_sums_of_16_bits_cannot_overflow(bits):
    highest, start = [2**bit - 1 for bit in bits] + [0, 0, 0], 0
    for stop in widening_stops(bits):
        for pair in (0, 2):
            places = [4 * group + pair + i for group in range(start, stop) for i in (0, 1)]
            assert sum(127 * highest[place] for place in places) <= 32767
        start = stop
    assert 4 * start >= len(bits) > 4 * (start - 1)


def test_keys_at_the_ends_of_their_range(without, monkeypatch):
    """Sums as large as they can be: all codes at their highest, under decoders of one sign."""
    monkeypatch.setattr(cpu, "IN_8_BITS", True)
    blocks = [slots([i], k) for i in range(4) for k in ("key", "value")]
    bundle = by_hand(MODEL, blocks, bits=[7, 7, 7, 7, 7, 7, 6, 6, 6, 5, 5, 3, 3, 3, 2, 1])
    coder = PageCoder(bundle, torch.device("cpu"), torch.float32)
    paged = paged_past(coder, 1, 100, 1, rotary("half"), [0])
    for tile in paged.tiles:
        tile.fill_(255)

    def extreme(reader):
        matrix = torch.full_like(reader.affine[0], 0.01) * torch.tensor([1.0, -1.0]).repeat(HEAD_DIM)
        return replace(reader, affine=(matrix, torch.zeros(2 * HEAD_DIM)), decode=lambda u: u @ matrix)

    paged = with_decoders(paged, extreme)
    query, exact = torch.randn(1, 4, 1, HEAD_DIM), ExactPast(*torch.randn(2, 1, 2, 3, HEAD_DIM), None)
    expected = naive.attend(query, exact, paged, 0.01)
    torch.testing.assert_close(cpu.attend(query, exact, paged, 0.01), expected, **SUMS)
