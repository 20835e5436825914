"""The search of a trellis: nearest in all that branches allow, in every implementation."""

from itertools import product
from types import SimpleNamespace

import pytest
import torch

from kvcar.codecs.quantizer import TrellisQuantizer
from kvcar.kernels.backend import Operation
from kvcar.kernels.native import find_compiler
from kvcar.kernels.trellis import SEARCH, Branches, levels_of, nearest_levels, stored_codes
from kvcar.kernels.trellis.bits import branches_of, changes_of
from kvcar.plan import BitGroup


def _form(backend):
    marks = pytest.mark.skipif(backend == "cpu" and not find_compiler(), reason="needs a C compiler")
    return pytest.param(SimpleNamespace(search=SEARCH.find(backend).run), marks=marks, id=backend)


FORMS = [_form(backend) for backend, _ in SEARCH.importable()]


def targets_of(pages, tokens, highest, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(pages, tokens, len(highest), generator=generator) / 4 + 0.5) * highest


def squared(levels, targets):
    return (levels - targets).square().sum(1)


def all_levels(bits, tokens):
    """Every row of levels that one latent of ``bits`` bits may have, ``[n, tokens]``."""
    codes = torch.tensor(list(product(range(2**bits), repeat=tokens)), dtype=torch.uint8)
    return levels_of(codes[..., None], 0, tokens)[..., 0].float()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("bits", "tokens"), [(1, 9), (2, 5), (3, 4)])
def test_none_is_nearer(form, bits, tokens):
    highest = torch.full((3,), 2.0 ** (bits + 1) - 1)
    targets = targets_of(20, tokens, highest)
    found = form.search(targets, highest, None)
    possible = all_levels(bits, tokens)
    least = (possible[None, :, None, :] - targets.transpose(1, 2)[:, None]).square().sum(-1).amin(1)
    assert torch.allclose(squared(found, targets), least, rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_a_page_in_two_parts_is_what_branches_allow(form):
    highest = torch.tensor([63.0, 15.0, 7.0, 3.0])
    targets = targets_of(3, 64, highest)
    for cut in (1, 2, 3, 17, 63):
        first = form.search(targets[:, :cut].contiguous(), highest, None)
        rest = form.search(targets[:, cut:].contiguous(), highest, Branches.after(first).states)
        levels = torch.cat([first, rest], dim=1).to(torch.uint8)
        assert torch.equal(levels_of(stored_codes(levels, 0), 0, 64), levels)


@pytest.mark.parametrize("form", FORMS)
def test_targets_beyond_all_levels(form, monkeypatch):
    monkeypatch.setattr(Operation, "choose", lambda *_: form.search)
    highest = torch.tensor([15.0, 3.0])
    targets = torch.tensor([1e9, -1e9, 1e30, -1e30] * 16).view(1, 64, 1).expand(1, 64, 2).contiguous()
    found = nearest_levels(targets, highest)
    assert ((found >= 0) & (found <= highest)).all()
    assert ((found > highest / 2) == (targets > 0)).float().mean() > 0.9


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6])
def test_a_fifth_less_error_than_whole_steps_on_normal_latents(bits):
    """As published for 8 states: 0.6 to 1 dB better than a uniform quantiser with its best step (Max 1960)."""
    step, whole = {
        1: (1.596, 0.3634), 2: (0.9957, 0.1188), 3: (0.586, 0.03744), 4: (0.3352, 0.01154), 5: (0.1881, 0.003495), 6: (0.1041, 0.001041),
    }[bits]  # fmt: skip
    z = torch.randn(64 * 60, 40, generator=torch.Generator().manual_seed(bits))
    scale = torch.full((40,), step / 2)
    quantizer = TrellisQuantizer([BitGroup(bits=bits, count=40)], scale, -scale * (2 ** (bits + 1) - 1) / 2, 64)
    error = float((quantizer.latents(quantizer.codes(z)) - z).square().mean())
    assert error < (0.9 if bits == 1 else 0.84) * whole


def test_the_first_tokens_of_a_page_are_coded_by_those_before_them():
    quantizer = TrellisQuantizer(
        [BitGroup(bits=7, count=2), BitGroup(bits=3, count=5)], torch.ones(7), torch.zeros(7), 64
    )
    z = torch.rand(2, 200, 7, generator=torch.Generator().manual_seed(1)) * 15
    whole = quantizer.codes(z)
    assert torch.equal(whole[..., :2], z[..., :2].round())
    # 30 tokens, then the rest of their page, a page, and the first ones of another.
    first = quantizer.codes(z[:, :30])
    rest = quantizer.codes(z[:, 30:], first)
    parts = torch.cat([first, rest], dim=1)
    assert torch.equal(parts[:, 64:], whole[:, 64:])
    levels = parts[..., 2:].to(torch.uint8)
    assert torch.equal(levels_of(stored_codes(levels, 0), 0, 64), levels)


def test_bits_there_and_back():
    branches = torch.randint(0, 2, (4, 64, 9), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    levels = branches << 1 ^ changes_of(branches)
    assert torch.equal(branches_of(levels), branches)
    assert not nearest_levels(torch.empty(0, 64, 9), torch.full((9,), 7.0)).numel()
