"""Encoding into pages: PyTorch's and Triton's forms against the specification."""

import pytest
import torch
from structures import STRUCTURES
from triton_device import DEVICE, poison_empty

from kvcar.cache.coder import PageCoder
from kvcar.codecs.linear import LinearCodec
from kvcar.codecs.quantizer import StaticQuantizer
from kvcar.errors import InputError, KernelError
from kvcar.kernels.encode import AffineEncoder, Writer, encode_pages, naive
from kvcar.kernels.encode import triton as backend
from kvcar.kernels.pack import unpack
from kvcar.layout import coded_segment
from kvcar.plan import BitGroup

GROUPS = [
    BitGroup(bits=b, count=c) for b, c in [(16, 3), (8, 1), (7, 2), (6, 30), (5, 29), (4, 6), (3, 7), (2, 3), (1, 11)]
]
WIDTH = 40


def writer_of(page_tokens, encoder, centre, scale, zero):
    """A writer of a linear codec whose 16-bit latents have scale 1 and zero 0."""
    raw = torch.tensor([group.bits == 16 for group in GROUPS for _ in range(group.count)])
    scale, zero = torch.where(raw, 1.0, scale).to(DEVICE), torch.where(raw, 0.0, zero).to(DEVICE)
    codec = LinearCodec(centre.to(DEVICE), encoder.to(DEVICE), encoder.T.to(DEVICE))
    quantizer = StaticQuantizer(GROUPS, scale, zero)
    affine = AffineEncoder(codec.encoder, codec.centre, scale, zero)
    segment = coded_segment(GROUPS, page_tokens, 48)
    return Writer(segment, codec.encode, quantizer.codes, affine, torch.float16)


def whole_numbers(low, high, *shape):
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(sum(shape))).float()


def exact_writer(page_tokens):
    """Sums of products of small whole numbers are exact in any order; a step of 2 makes every other latent a tie."""
    latents = sum(group.count for group in GROUPS)
    return writer_of(
        page_tokens, whole_numbers(-2, 2, WIDTH, latents), whole_numbers(-3, 3, WIDTH),
        torch.full((latents,), 2.0), whole_numbers(-60, 0, latents),
    )  # fmt: skip


@pytest.mark.parametrize(("page_tokens", "pages"), [(32, 2), (64, 1), (96, 1)])
def test_exact_sums_give_the_same_bytes(page_tokens, pages, monkeypatch):
    writer = exact_writer(page_tokens)
    wide = whole_numbers(-4, 4, 2, 7 + pages * page_tokens, WIDTH + 8).to(DEVICE)
    x = wide[:, 7:, 8:]  # strided
    expected = naive.encode_pages(x, writer)
    poison_empty(monkeypatch)
    for implementation in (encode_pages, backend.encode_pages):
        got = implementation(x, writer)
        assert got.shape == (2, pages, writer.segment.size)
        assert torch.equal(got, expected)


def test_other_sums_are_a_code_apart_at_most():
    latents = sum(group.count for group in GROUPS)
    generator = torch.Generator().manual_seed(1)
    writer = writer_of(
        64, torch.randn(WIDTH, latents, generator=generator), torch.randn(WIDTH, generator=generator),
        torch.rand(latents, generator=generator) / 4 + 0.05, torch.randn(latents, generator=generator) - 6,
    )  # fmt: skip
    x = torch.randn(2, 128, WIDTH, generator=generator).to(DEVICE)
    expected, got = (unpack(f(x, writer), writer.segment) for f in (encode_pages, backend.encode_pages))
    raw = writer.segment.raw
    torch.testing.assert_close(got[..., :raw], expected[..., :raw], atol=1e-3, rtol=1e-3)
    apart = (got[..., raw:] - expected[..., raw:]).abs()
    assert apart.max() <= 1
    assert (apart > 0).float().mean() < 1e-3


def test_infinite_latents_are_clamped():
    writer = exact_writer(32)
    x = torch.full((1, 32, WIDTH), 1e6, device=DEVICE) * whole_numbers(-1, 1, 1, 32, WIDTH).to(DEVICE)
    assert torch.equal(backend.encode_pages(x, writer), naive.encode_pages(x, writer))


@pytest.mark.parametrize("structure", list(STRUCTURES))
def test_a_units_writer_does_what_the_unit_does(structure):
    coder = PageCoder(STRUCTURES[structure](), torch.device(DEVICE), torch.float32)
    for unit in coder.units[:2]:
        x = torch.randn(1, 64, 16 * len(unit.unit.slots)).to(DEVICE)
        stored = unit.stored(x)
        expected = unit.pack(stored.unflatten(1, (2, 32)))
        writer = unit.writer
        assert torch.equal(encode_pages(x, writer), expected)
        if structure in ("raw latents", "lossless"):
            assert torch.equal(naive.encode_pages(x, writer), expected)
        supported = not (writer.segment.lossless or writer.segment.branched < writer.segment.latents)
        assert (backend.unsupported(x, writer) is None) == supported
        if supported:
            apart = unpack(backend.encode_pages(x, writer), writer.segment) - unpack(expected, writer.segment)
            assert apart.abs().max() <= 1
            assert (apart[..., writer.segment.raw :] != 0).float().mean() < 1e-3


def test_what_is_not_supported_is_said():
    writer = exact_writer(32)
    x = torch.zeros(1, 40, WIDTH, device=DEVICE)
    for implementation in (naive.encode_pages, encode_pages, backend.encode_pages):
        with pytest.raises(InputError, match=r"40 tokens.*multiple of the 32"):
            implementation(x, writer)
    unknown = Writer(writer.segment, writer.encode, writer.codes, None, torch.float16)
    with pytest.raises(KernelError, match=r"cannot be used.*dynamic.*another backend"):
        backend.encode_pages(x, unknown)
