"""Closed forms: what they promise to be optimal at, and exactness where nothing is lost."""

import pytest
import torch

from kvcar.codecs import IdentityCodec, StaticQuantizer
from kvcar.codecs.autoencoder import AutoencoderModule
from kvcar.fit.autoencoder import train_autoencoder, warm_start
from kvcar.fit.basis import fit_quantizer, groups_of, linear_codec, principal_basis
from kvcar.plan import BitGroup


def correlated(count=4000, width=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator) * torch.linspace(2, 0.05, width)[:, None]
    return torch.randn(count, width, generator=generator) @ mix * torch.linspace(0.1, 30, width) + 7


def basis_of(x):
    return principal_basis(x.double().mean(0), torch.cov(x.double().T, correction=0))


@pytest.fixture(scope="module")
def data():
    x = correlated()
    return x, basis_of(x)


def relative_error(codec, quantizer, x):
    z = codec.encode(x)
    back = codec.decode(quantizer.latents(quantizer.codes(z)))
    return float(((back - x) / x.std(0)).square().mean())


def test_raw_latents_of_every_direction_lose_almost_nothing(data):
    x, basis = data
    codec, quantizer = linear_codec(basis, torch.full((12,), 16), x)
    assert relative_error(codec, quantizer, x) < 1e-6


def test_a_rank_cut_is_the_best_there_is(data):
    x, basis = data
    bits = torch.tensor([16] * 5 + [0] * 7)
    codec, quantizer = linear_codec(basis, bits, x)
    best = basis.variances[5:].sum() / 12  # Eckart-Young, in the normalised metric
    assert relative_error(codec, quantizer, x) == pytest.approx(float(best), rel=1e-3)


def test_more_bits_err_less(data):
    x, basis = data
    errors = [relative_error(*linear_codec(basis, torch.full((12,), b), x), x) for b in range(1, 9)]
    assert errors == sorted(errors, reverse=True)
    assert errors[7] < errors[0] / 1000


@pytest.mark.parametrize("bits", range(1, 9))
def test_quantiser_is_no_worse_than_the_best_for_a_normal(bits):
    z = torch.randn(20000, 3, generator=torch.Generator().manual_seed(1)) * torch.tensor([0.01, 1.0, 50.0]) + 3
    quantizer = fit_quantizer((BitGroup(bits=bits, count=3),), z)
    error = (quantizer.latents(quantizer.codes(z)) - z).square().mean(0) / z.var(0)
    from kvcar.fit.bits import DISTORTION

    assert (error < 1.1 * DISTORTION[bits]).all()


def test_codes_are_whole_numbers_in_range_however_far_the_latent():
    groups = (BitGroup(bits=16, count=1), BitGroup(bits=3, count=2))
    quantizer = StaticQuantizer(groups, torch.tensor([1.0, 0.5, 0.5]), torch.tensor([0.0, -1.75, -1.75]))
    codes = quantizer.codes(torch.tensor([[1e9, 1e9, -1e9], [0.1, 0.0, 0.3]]))
    assert codes[0].tolist() == [65504.0, 7.0, 0.0]
    assert codes[1, 0] == torch.tensor(0.1).half().float()
    assert (codes[:, 1:] == codes[:, 1:].round()).all()


def test_groups_fall_in_bits_and_drop_empty_latents():
    groups = groups_of(torch.tensor([3, 0, 8, 3, 1, 0]))
    assert [(g.bits, g.count) for g in groups] == [(8, 1), (3, 2), (1, 1)]


def test_identity_codec_orders_and_restores():
    codec = IdentityCodec(torch.tensor([2, 0, 1]))
    x = torch.tensor([[10.0, 20.0, 30.0]])
    assert codec.encode(x).tolist() == [[30.0, 10.0, 20.0]]
    assert torch.equal(codec.decode(codec.encode(x)), x)
    matrix, bias = codec.affine_decoder()
    assert torch.equal(codec.encode(x) @ matrix + bias, x)


@pytest.mark.parametrize("latents", [1, 5, 12])
def test_the_autoencoder_starts_at_the_pca(data, latents):
    x, basis = data
    folded = warm_start(basis, latents).eval().fold()
    mean = basis.mean.float()
    expected = (x - mean) @ basis.encoder[:, :latents].float() @ basis.decoder[:latents].float() + mean
    torch.testing.assert_close(folded.decode(folded.encode(x)), expected, atol=2e-3, rtol=1e-3)


def test_folding_keeps_the_function(data):
    x, basis = data
    torch.manual_seed(0)
    module = AutoencoderModule(basis.mean.float(), basis.std.float(), hidden=9, latents=4)
    for _ in range(5):
        module(x[torch.randint(len(x), (256,))])  # moves BatchNorm's running statistics
    module.eval()
    folded = module.fold()
    z, back = module(x)
    torch.testing.assert_close(folded.encode(x), z, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(folded.decode(z), back, atol=1e-3, rtol=1e-4)


def test_training_improves_on_the_pca_where_a_line_is_not_enough_and_repeats():
    t = torch.rand(3000, 1, generator=torch.Generator().manual_seed(2)) * 2 - 1
    x = torch.cat([t, t.abs(), t.clamp_min(0.3)], 1)  # a curve: one latent is enough, but not a linear one
    basis = basis_of(x)
    results = [train_autoencoder(basis, 1, 16, x, steps, seed=0) for steps in (0, 1000, 1000)]
    start, trained, again = (relative_error(*r, x) for r in results)
    assert trained < 0.8 * start
    assert again == trained
