"""Packing: the fast form against the specification, bit for bit, and there and back."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcar.codecs.quantizer import latent_bits
from kvcar.kernels.native import find_compiler
from kvcar.kernels.pack import PACKING, UNPACKING, naive, pack, unpack
from kvcar.kernels.trellis import levels_of
from kvcar.layout import coded_segment
from kvcar.plan import MOST_TRELLIS_BITS, RAW_BITS, BitGroup

GROUPS = st.lists(st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8, 16]), min_size=1, max_size=9, unique=True).flatmap(
    lambda bits: st.tuples(
        *[st.builds(BitGroup, bits=st.just(b), count=st.integers(1, 5)) for b in sorted(bits, reverse=True)]
    )
)


def random_levels(groups, lead, page_tokens, seed):
    """Stored values of codes with a trellis: those that its branches allow."""
    codes = random_codes(groups, lead, page_tokens, seed)
    first = sum(group.count for group in groups if group.bits > MOST_TRELLIS_BITS)
    raw = sum(group.count for group in groups if group.bits == RAW_BITS)
    levels = levels_of(codes[..., raw:].to(torch.uint8), first - raw, page_tokens)
    return torch.cat([codes[..., :raw], levels.float()], dim=-1)


def random_codes(groups, lead, page_tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    bits = latent_bits(groups)
    top = 2.0 ** bits.clamp(max=8)
    u = (torch.rand(*lead, page_tokens, len(bits), generator=generator) * top).floor()
    raw = torch.randn(u.shape, generator=generator).half().float()
    return torch.where(bits == 16, raw, u)


def _form(backend):
    """Both directions of a backend, whichever file registered them."""
    marks = pytest.mark.skipif(backend == "cpu" and not find_compiler(), reason="needs a C compiler")
    own = SimpleNamespace(pack=PACKING.find(backend).run, unpack=UNPACKING.find(backend).run)
    return pytest.param(own, marks=marks, id=backend)


FORMS = [_form(backend) for backend, _ in PACKING.importable()]


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=40, deadline=None)
@given(groups=GROUPS, seed=st.integers(0, 2**16))
def test_same_bytes_as_the_specification(form, groups, seed):
    layout = coded_segment(groups, 32, 0)
    u = random_codes(groups, (), 32, seed)
    data = form.pack(u, layout)
    assert data.dtype == torch.uint8
    assert torch.equal(data, naive.pack(u, layout))
    assert torch.equal(form.unpack(data, layout), u)
    assert torch.equal(naive.unpack(data, layout), u)


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=40, deadline=None)
@given(groups=GROUPS, seed=st.integers(0, 2**16), page_tokens=st.sampled_from([32, 64, 96]))
def test_same_bytes_as_the_specification_with_a_trellis(form, groups, seed, page_tokens):
    layout = coded_segment(groups, page_tokens, 0, trellis=True)
    assert layout.size == coded_segment(groups, page_tokens, 0).size
    u = random_levels(groups, (), page_tokens, seed)
    data = form.pack(u, layout)
    assert torch.equal(data, naive.pack(u, layout))
    assert torch.equal(form.unpack(data, layout), u)
    assert torch.equal(naive.unpack(data, layout), u)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("page_tokens", [64, 1024])
def test_planes_wider_than_a_vector_with_a_trellis(form, page_tokens):
    groups = [BitGroup(bits=bits, count=count) for bits, count in ((8, 3), (5, 70), (4, 1), (3, 130), (2, 65), (1, 77))]
    layout, u = coded_segment(groups, page_tokens, 0, trellis=True), random_levels(groups, (2,), page_tokens, 1)
    assert torch.equal(form.unpack(form.pack(u, layout), layout), u)


def test_the_backend_is_the_one_asked_for(monkeypatch):
    for backend, expected in {"torch": "torch", "naive": "torch", "cpu": "cpu"}.items():
        for operation in (PACKING, UNPACKING):
            assert operation.choose(backend, "any") is operation.find(expected).run
    layout = coded_segment([BitGroup(bits=3, count=5)], 32, 0)
    u = random_codes([BitGroup(bits=3, count=5)], (2, 3), 32, 1)
    for backend in ("torch", "naive", "cpu"):
        monkeypatch.setenv("KVCAR_KERNELS", backend)
        assert torch.equal(unpack(pack(u, layout), layout), u)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("page_tokens", [32, 64, 160])
def test_many_pages_out_of_a_wider_buffer(form, page_tokens):
    groups = [BitGroup(bits=b, count=c) for b, c in [(16, 3), (8, 1), (7, 2), (5, 9), (3, 7), (1, 11)]]
    layout = coded_segment(groups, page_tokens, 48)
    u = random_codes(groups, (2, 5), page_tokens, 3)
    buffer = torch.full((2, 5, layout.end + 16), 255, dtype=torch.uint8)
    buffer[..., layout.offset : layout.end] = form.pack(u, layout)
    assert torch.equal(form.unpack(buffer[..., layout.offset : layout.end], layout), u)
    assert torch.equal(form.unpack(buffer[1, :, layout.offset : layout.end], layout), u[1])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "counts", [(40, 24), (63, 1, 1), (3, 70, 130, 5), (1,) * 8, (7, 60, 9, 64, 70, 2, 1, 30)], ids=str
)
def test_more_latents_than_a_vector_has(form, counts):
    groups = [BitGroup(bits=8 - i, count=count) for i, count in enumerate(counts)]
    layout = coded_segment(groups, 96, 0)
    u = random_codes(groups, (3,), 96, 5)
    assert torch.equal(form.unpack(form.pack(u, layout), layout), u)


@settings(max_examples=40, deadline=None)
@given(groups=GROUPS)
def test_a_segment_takes_exactly_its_bits(groups):
    layout = coded_segment(groups, 64, 0)
    assert layout.size * 8 == 64 * sum(g.bits * g.count for g in groups)


def test_no_more_planes_than_widths_ask_for():
    groups = [BitGroup(bits=b, count=2) for b in (7, 6, 5, 4)]
    planes = coded_segment(groups, 64, 0).planes
    four = [p for p in planes if p.bits == 4]
    assert [(p.start, p.stop) for p in four] == [(0, 8)]
