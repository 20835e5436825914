"""Triton's attention against the specification; on CUDA natively, elsewhere under Triton's interpreter."""

import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from speed.synthetic import Codes, RandomPast, Shape, coded_plan, layer_geometry, random_bundle
from structures import STRUCTURES, paged_past, rotary
from triton_device import DEVICE, poison_empty

from kvcar.cache.coder import PageCoder
from kvcar.errors import KernelError
from kvcar.kernels.attend import ExactPast, PagedPast, Reader, naive, triton_paged, triton_tables
from kvcar.kernels.attend import triton as backend
from kvcar.kernels.pack import pack
from kvcar.kernels.rotary import RotaryTable
from kvcar.layout import coded_segment
from kvcar.plan import BitGroup

REFUSED = {"autoencoder": "not affine"}
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}


@pytest.fixture(scope="module", params=list(STRUCTURES), ids=str)
def structure(request):
    return request.param


@pytest.fixture(scope="module")
def coder(structure):
    return coder_of(structure)


def coder_of(structure):
    return PageCoder(STRUCTURES[structure](), torch.device(DEVICE), torch.float32)


def random(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(DEVICE, dtype)


def exact_past(batch, heads, count, head_dim, dtype=torch.float32):
    """Six sinks and earlier tokens with the ``count`` of this pass, seen causally."""
    mask = torch.ones(count, 5 + count, dtype=torch.bool, device=DEVICE).tril(5)[None, None].expand(batch, -1, -1, -1)
    size = (batch, heads, 5 + count, head_dim)
    return ExactPast(random(*size, dtype=dtype), random(*size, dtype=dtype), mask)


def check(query, exact, paged, softcap=None):
    expected = naive.attend(query, exact, paged, query.shape[-1] ** -0.5, softcap)
    got = backend.attend(query, exact, paged, query.shape[-1] ** -0.5, softcap)
    assert got.dtype == query.dtype
    torch.testing.assert_close(got, expected, atol=TOLERANCE[query.dtype], rtol=TOLERANCE[query.dtype])
    given = (query, exact, paged, query.shape[-1] ** -0.5, softcap, torch.linspace(-2, 3, query.shape[1]))
    with_sinks, wanted = backend.attend(*given), naive.attend(*given)
    torch.testing.assert_close(with_sinks, wanted, atol=TOLERANCE[query.dtype], rtol=TOLERANCE[query.dtype])
    return got


@pytest.mark.parametrize("with_rotary", [True, False], ids=["rotary", "no positions"])
def test_every_structure(structure, coder, with_rotary):
    """330 tokens lie in two arenas, the last page partly filled; the second sequence is padded."""
    layer = int(with_rotary)
    paged = paged_past(coder, layer, 330, 2, rotary(DEVICE) if with_rotary else None, [0, 9])
    assert len(paged.tiles) == 2
    query, exact = random(2, 4, 1, 16), exact_past(2, 2, 1, 16)
    if structure in REFUSED:
        assert REFUSED[structure] in backend.unsupported(query, paged)
        with pytest.raises(KernelError, match=f"cannot be used.*{REFUSED[structure]}.*another backend"):
            backend.attend(query, exact, paged, 0.25)
    else:
        assert backend.unsupported(query, paged) is None
        check(query, exact, paged, 5.0 if with_rotary else None)


@pytest.mark.parametrize(("tokens", "count"), [(1, 1), (33, 1), (63, 7), (1000, 1)])
def test_any_length(tokens, count):
    paged = paged_past(coder_of("raw latents"), 0, tokens, 2, rotary(DEVICE), [0, min(9, tokens - 1)])
    check(random(2, 4, count, 16), exact_past(2, 2, count, 16), paged)


def made_past(tokens, heads, head_dim, table, groups, orders, page_tokens=64):
    """Two ragged sequences of random codes, the decoders random too; ``orders``: heads of each reader."""
    generator = torch.Generator().manual_seed(tokens)
    readers, segments, offset = [], [], 0
    latents = sum(group.count for group in groups)
    for order in orders:
        segments.append(coded_segment(groups, page_tokens, offset))
        offset = -(-segments[-1].end // 16) * 16
        shape = (latents, len(order) * head_dim)
        matrix = torch.randn(*shape, generator=generator) / (2.0 ** groups[0].bits * latents**0.5)
        affine = matrix.to(DEVICE), torch.randn(shape[1], generator=generator).to(DEVICE)
        readers.append(Reader(segments[-1], order, None, partial(affinely, affine), affine, False, torch.float16))
    pages = torch.full((2, -(-tokens // page_tokens), offset), 255, dtype=torch.uint8)
    bits = torch.tensor([min(group.bits, 8) for group in groups for _ in range(group.count)])
    for segment in segments:
        u = (torch.rand(2, pages.shape[1], page_tokens, latents, generator=generator) * 2.0**bits).floor()
        pages[..., segment.offset : segment.end] = pack(u, segment)
    first, start = torch.tensor([4, 21], device=DEVICE), torch.tensor([0, 17], device=DEVICE)
    pages = pages.to(DEVICE)
    tiles = [pages[:, :1], pages[:, 1:]]  # not contiguous
    return PagedPast(tiles, tokens, first, 21, start, tuple(readers), tuple(readers[::-1]), table)


def affinely(affine, u):
    return u @ affine[0] + affine[1]


def table(width, style="half", scale=1.0):
    return RotaryTable(100.0 ** -torch.linspace(0, 1, width // 2, dtype=torch.float64, device=DEVICE), scale, style)


@pytest.mark.parametrize(
    ("head_dim", "orders", "group", "count", "dtype", "rotated"),
    [
        (32, [(2, 0), (1, 3)], 1, 1, torch.float32, lambda: table(32)),
        (32, [(2, 0), (1, 3)], 1, 3, torch.float32, lambda: table(32)),
        (64, [(1, 0)], 4, 2, torch.bfloat16, lambda: table(32, "interleaved", 1.2)),
        (80, [(0,), (1,)], 2, 1, torch.float16, lambda: table(80)),
        (96, [(0, 1)], 1, 1, torch.bfloat16, lambda: table(48)),
        (128, [(0, 1)], 4, 1, torch.bfloat16, lambda: table(128)),
        (256, [(0,)], 2, 1, torch.float32, lambda: table(256, "interleaved")),
        (64, [(0,)], 8, 16, torch.bfloat16, lambda: table(64)),
        (80, [(3, 1, 0), (2,)], 2, 3, torch.float16, lambda: None),
    ],
)
def test_shapes_styles_and_dtypes(head_dim, orders, group, count, dtype, rotated):
    heads = sum(len(order) for order in orders)
    groups = [BitGroup(bits=b, count=c) for b, c in [(7, 9), (5, 20), (3, 11)]]
    paged = made_past(150, heads, head_dim, rotated(), groups, orders)
    query = random(2, count, heads * group, head_dim, dtype=dtype).transpose(1, 2)  # as models have it
    check(query, exact_past(2, heads, count, head_dim, dtype), paged)


@pytest.mark.parametrize("page_tokens", [32, 64, 96, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_page_and_every_number_of_bits(page_tokens, dtype):
    """Odd counts, so that words start at every byte; pages that a tile holds whole, and others."""
    groups = [BitGroup(bits=b, count=c) for b, c in [(8, 3), (7, 1), (6, 5), (5, 2), (4, 7), (3, 1), (2, 6), (1, 9)]]
    paged = made_past(200, 2, 32, table(32), groups, [(0, 1)], page_tokens)
    check(random(2, 4, 1, 32, dtype=dtype), exact_past(2, 2, 1, 32, dtype), paged)


def test_keys_beyond_float16_are_multiplied_as_float32():
    paged = made_past(70, 1, 32, table(32), [BitGroup(bits=8, count=20)], [(0,)])
    matrix, bias = paged.key_readers[0].affine
    affine = (matrix * 2.0**22).clamp(-(2.0**14), 2.0**14), bias
    reader = replace(paged.key_readers[0], affine=affine, decode=partial(affinely, affine))
    far = replace(paged, key_readers=(reader,))
    assert not triton_paged.banks(far.key_readers, torch.device(DEVICE), 64)[0].keys_fit_float16
    assert triton_paged.banks(paged.key_readers, torch.device(DEVICE), 64)[0].keys_fit_float16
    check(random(2, 2, 1, 32, dtype=torch.bfloat16) * 1e-6, exact_past(2, 1, 1, 32, torch.bfloat16), far)


def test_a_block_of_two_thousand_latents():
    groups = [BitGroup(bits=8, count=100), BitGroup(bits=6, count=1000), BitGroup(bits=1, count=948)]
    paged = made_past(70, 1, 32, table(32), groups, [(0,)])
    check(random(2, 2, 1, 32), exact_past(2, 1, 1, 32), paged)


@pytest.mark.parametrize(
    ("block_heads", "latents", "dtype"),
    [
        (1, ({8: 5, 7: 9, 5: 21}, {6: 18, 3: 11}), torch.bfloat16),  # a matrix that stays
        (2, ({8: 6, 6: 41, 4: 60, 1: 50},), torch.bfloat16),  # a joint block
        (2, ({8: 70, 6: 10},), torch.float32),  # more than a block of latents whose decoder is not in 8 bits
    ],
)
def test_decoders_in_8_bits_at_full_width(block_heads, latents, dtype):
    """Values' decoders are read where they lie, and keys' are one byte a weight in the kernel's order."""
    plan = coded_plan(layer_geometry(Shape(4, 2, 128), 1000), Codes.of("linear8", block_heads, *latents))
    past = RandomPast(random_bundle(plan), 180, 1, dtype, torch.device(DEVICE))
    query, (exact, paged) = past.query(), past.past()
    before = past.coder.codec_bytes()
    check(query, exact, paged)
    (keys,) = (bank for bank in triton_paged.banks(paged.key_readers, query.device, 64))
    (values,) = (bank for bank in triton_paged.banks(paged.value_readers, query.device, 128))
    assert keys.rounded
    assert values.rounded
    decoder = next(made for made in values.made.values() if isinstance(made, triton_tables.ValueDecoder))
    readers = [reader.rounded.decoder.data_ptr() for reader in paged.value_readers]
    assert {int(place) for place in decoder.places[:, 0]} >= set(readers)
    assert decoder.matrix.numel() == 0
    matrix = next(made for made in keys.made.values() if isinstance(made, triton_tables.KeyDecoder)).matrix
    assert matrix.dtype == torch.int8
    made = past.coder.codec_bytes() - before
    assert matrix.nbytes < made


def test_spans_and_splits_are_merged(monkeypatch):
    """A scratch for few scores takes a long past in several spans, each of several splits."""
    paged = paged_past(coder_of("one key head exact"), 0, 1300, 1, rotary(DEVICE), [0])
    query, exact = random(1, 4, 1, 16), exact_past(1, 2, 1, 16)
    monkeypatch.setattr(triton_paged, "programs", lambda device: 1000)
    monkeypatch.setattr(backend, "_SCORES_AT_ONCE", 4 * 600)
    check(query, exact, paged)


def test_scratch_and_unfilled_room_are_never_read(monkeypatch):
    paged = paged_past(coder_of("one key head exact"), 0, 40, 1, rotary(DEVICE), [3])
    query, exact = random(1, 4, 1, 16), exact_past(1, 2, 1, 16)
    before = check(query, exact, paged)
    for arena in paged.tiles:
        arena[:, 2:] = 255  # 40 tokens fill one page and part of the second
        for reader in (*paged.key_readers, *paged.value_readers):
            if reader.segment.lossless:  # the rows of tokens to come become NaN
                segment = reader.segment
                arena[:, 1, segment.offset + segment.size // 4 : segment.end] = 255
    poison_empty(monkeypatch)
    assert torch.equal(backend.attend(query, exact, paged, 0.25), before)


def test_a_query_that_sees_nothing_gives_zeros_not_nan():
    paged = paged_past(coder_of("raw latents"), 0, 3, 1, rotary(DEVICE), [0])  # three sinks
    keys = random(1, 2, 3, 16)
    nothing = ExactPast(keys, keys, torch.zeros(1, 1, 2, 3, dtype=torch.bool, device=DEVICE))
    for past in (None, paged):
        got = backend.attend(random(1, 4, 2, 16), nothing, past, 1.0)
        assert torch.equal(got, torch.zeros_like(got))


def test_what_is_not_supported_is_said(monkeypatch):
    paged = paged_past(coder_of("raw latents"), 0, 40, 1, rotary(DEVICE), [0])
    query = random(1, 4, 1, 16)
    assert "float64" in backend.unsupported(query.double(), None)
    assert backend.unsupported(query.bfloat16(), paged) is None
    monkeypatch.setattr(backend, "multiplies_subnormals", lambda device: False)
    assert "subnormal" in backend.unsupported(query.bfloat16(), paged)
    assert backend.unsupported(query, paged) is None
    dynamic = tuple(replace(reader, restore=lambda u: u) for reader in paged.value_readers)
    assert "dynamic" in backend.unsupported(query, replace(paged, value_readers=dynamic))
    lossless = tuple(replace(r, segment=replace(r.segment, lossless=True)) for r in paged.key_readers)
    assert "before RoPE" in backend.unsupported(query, replace(paged, key_readers=lossless))
    wide = [torch.cat([tile, tile[..., :8]], dim=-1)[..., 8:] for tile in paged.tiles]
    assert "16 bytes" in backend.unsupported(query, replace(paged, tiles=wide))


def test_the_kernels_compile_for_an_h100(tmp_path):
    """Down to machine code, which needs no GPU; a step's kernels must not spill much (bytes a thread).

    Triton 3.6 spills nothing, 3.9 up to 136 bytes: what stays in registers is its compiler's choice.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    script = Path(__file__).with_name("gpu_compile.py")
    result = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    assert {name for name, *_ in lines} == {
        "decode_scores",
        "direct_scores",
        "latent_sums",
        "mean_sums",
        "exact_piece",
        "merge_pieces",
        "encode_block",
        "quantize_block",
    }
    for name, shared, _, spilled in lines:
        assert int(shared) <= 227 * 1024, name
        assert int(spilled) <= 256, name
