"""The linear codec in 8 bits: as good as the one in float, a fifth of its bytes, and nothing odd from strangers."""

from types import SimpleNamespace

import pytest
import torch

from kvcar.bundle import CodedBlock
from kvcar.codecs import Linear8Codec, RoundedMetric
from kvcar.errors import BundleError
from kvcar.fit.basis import fit_quantizer, groups_of, linear8_codec, linear_codec, principal_basis
from kvcar.fit.bits import allocate_bits
from kvcar.geometry import Slot
from kvcar.plan import Block

HEAD_DIM, SIDES, SIDE = 16, 4, 32
WIDTH = SIDES * SIDE
PLAN = SimpleNamespace(geometry=SimpleNamespace(head_dim=HEAD_DIM), page_tokens=64)  # what a block needs of its plan
SLOTS = tuple(Slot(layer, head, kind) for layer in range(2) for kind in ("key", "value") for head in range(2))


def spread(rows, width, generator, decay):
    scales = torch.logspace(0, -decay, width, dtype=torch.float64)
    return torch.randn(rows, width, generator=generator, dtype=torch.float64) * scales


@pytest.fixture(scope="module")
def case():
    """Vectors with a steep spectrum, and a metric under which their large directions are not those that cost."""
    draw = torch.Generator().manual_seed(3)
    mix = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=draw, dtype=torch.float64))[0]
    x = spread(4000, WIDTH, draw, 3) @ mix + 2
    metrics = []
    for _ in range(SIDES):
        gradients = (
            spread(300, SIDE, draw, 1)
            @ torch.linalg.qr(torch.randn(SIDE, SIDE, generator=draw, dtype=torch.float64))[0]
        )
        own = gradients.T @ gradients / 300
        metrics.append(RoundedMetric(own + 0.1 * own.diagonal().mean() * torch.eye(SIDE, dtype=torch.float64)))
    basis = principal_basis(x.mean(0), torch.cov(x.T, correction=0), [m.matrix() for m in metrics])
    bits = allocate_bits([basis.variances], int(2.5 * WIDTH))[0]
    return x.float(), basis, bits, metrics


def cost(case, codec, quantizer):
    x, _, _, metrics = case
    error = (codec.decode(quantizer.latents(quantizer.codes(codec.encode(x)))) - x).double()
    return float((error @ torch.block_diag(*(m.matrix() for m in metrics)) * error).sum(1).mean())


def made(case):
    x, basis, bits, metrics = case
    return linear8_codec(basis, bits, x, metrics, HEAD_DIM)


def test_rounding_costs_little_and_saves_most_bytes(case):
    x, basis, bits, _ = case
    plain, rounded = linear_codec(basis, bits, x), made(case)
    assert int(bits.max()) >= 6
    assert cost(case, *rounded) <= 1.02 * cost(case, *plain)
    assert CodedBlock(*rounded).tensors()["decoder"].dtype == torch.int8
    sizes = [sum(t.nbytes for t in CodedBlock(*own).tensors().values()) for own in (rounded, plain)]
    assert sizes[0] < sizes[1] / 3


def test_latents_are_those_of_least_cost(case):
    x, _, _, metrics = case
    codec, _ = made(case)
    matrix, mean = codec.affine_decoder()
    metric = torch.block_diag(*(m.matrix() for m in metrics))
    weighed = matrix.double() @ metric
    best = torch.linalg.solve(weighed @ matrix.T.double(), weighed @ (x - mean).T.double()).T
    # To within a part of the step that they are rounded to.
    assert float((codec.encode(x) - best).abs().max()) < 0.25


def test_strong_latents_would_drown_the_others(case):
    x, basis, bits, metrics = case
    order = torch.argsort(bits, descending=True, stable=True)[: int((bits > 0).sum())]
    steps = fit_quantizer(groups_of(bits), ((x.double() - basis.mean) @ basis.encoder[:, order]).float()).scale
    decoder = basis.decoder[order] * steps[:, None]
    errors = []
    for strong in (0, int((bits[order] >= 6).sum())):
        codec = Linear8Codec.rounded(basis.mean, decoder, metrics, HEAD_DIM, 0, strong)
        back = codec.decode(codec.encode(x)) - x
        errors.append(float((back.double() @ torch.block_diag(*(m.matrix() for m in metrics)) * back).sum()))
    assert errors[1] < 0.7 * errors[0]


def test_decoding_and_the_affine_decoder_agree(case):
    codec, quantizer = made(case)
    matrix, bias = codec.affine_decoder()
    z = quantizer.latents(quantizer.codes(codec.encode(case[0][:50])))
    assert torch.allclose(codec.decode(z), z @ matrix + bias, atol=1e-4)
    rounded = codec.rounded_decoder()
    whole, bias = rounded.affine(codec.latents)
    assert torch.equal(whole, matrix)
    assert torch.equal(bias, codec.mean)


def test_a_metric_that_rounding_would_spoil_stays_positive_definite():
    """Nearly singular: without care its rounded entries are of no metric."""
    column = torch.linspace(1, 1.01, 300, dtype=torch.float64)
    metric = torch.outer(column, column) + 1e-4 * torch.eye(300, dtype=torch.float64)
    rounded = RoundedMetric(metric)
    assert float(torch.linalg.eigvalsh(rounded.matrix())[0]) > 0
    assert torch.allclose(rounded.matrix().diagonal(), metric.diagonal(), rtol=1e-12)
    again = RoundedMetric(rounded.matrix())
    assert torch.equal(again.codes, rounded.codes)


def test_what_does_not_fit_is_refused(case):
    codec, quantizer = made(case)
    block = Block(codec="linear8", slots=SLOTS, groups=groups_of(case[2]))
    tensors = CodedBlock(codec, quantizer).tensors()
    assert CodedBlock.from_tensors(tensors, block, PLAN).codec.latents == codec.latents
    slots, groups, dim, together = codec.decoder.shape
    changes = {
        "decoder": codec.decoder.reshape(slots // 2, groups, 2 * dim, together),
        "sides": torch.tensor([WIDTH - 1, 1], dtype=torch.int32),
        "norm": torch.zeros_like(codec.norm),
        "cross": codec.cross[1:],
        "strong": codec.strong.float(),
        "exact": codec.exact[:, :-1],
    }
    for name, changed in changes.items():
        with pytest.raises(BundleError):
            CodedBlock.from_tensors(tensors | {name: changed}, block, PLAN)
