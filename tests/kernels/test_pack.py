"""Packing: the fast form against the specification, bit for bit, and there and back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcar.codecs.quantizer import latent_bits
from kvcar.kernels.layout import coded_segment
from kvcar.kernels.pack import naive, pack, unpack
from kvcar.plan import BitGroup

GROUPS = st.lists(st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8, 16]), min_size=1, max_size=9, unique=True).flatmap(
    lambda bits: st.tuples(
        *[st.builds(BitGroup, bits=st.just(b), count=st.integers(1, 5)) for b in sorted(bits, reverse=True)]
    )
)


def random_codes(groups, lead, page_tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    bits = latent_bits(groups)
    top = 2.0 ** bits.clamp(max=8)
    u = (torch.rand(*lead, page_tokens, len(bits), generator=generator) * top).floor()
    raw = torch.randn(u.shape, generator=generator).half().float()
    return torch.where(bits == 16, raw, u)


@settings(max_examples=40, deadline=None)
@given(groups=GROUPS, seed=st.integers(0, 2**16))
def test_same_bytes_as_the_specification(groups, seed):
    layout = coded_segment(groups, 32, 0)
    u = random_codes(groups, (), 32, seed)
    data = pack(u, layout)
    assert data.dtype == torch.uint8
    assert torch.equal(data, naive.pack(u, layout))
    assert torch.equal(unpack(data, layout), u)
    assert torch.equal(naive.unpack(data, layout), u)


@pytest.mark.parametrize("page_tokens", [32, 64, 160])
def test_many_pages_out_of_a_wider_buffer(page_tokens):
    groups = [BitGroup(bits=b, count=c) for b, c in [(16, 3), (8, 1), (7, 2), (5, 9), (3, 7), (1, 11)]]
    layout = coded_segment(groups, page_tokens, 48)
    u = random_codes(groups, (2, 5), page_tokens, 3)
    buffer = torch.full((2, 5, layout.end + 16), 255, dtype=torch.uint8)
    buffer[..., layout.offset : layout.end] = pack(u, layout)
    assert torch.equal(unpack(buffer[..., layout.offset : layout.end], layout), u)


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
