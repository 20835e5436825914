"""Codes with a trellis: less error in the same bytes, whatever reads and writes the pages."""

import pytest
import torch
from bundles import fitted
from stepped import EVERY_KERNEL, error, logits
from tiny import tiny_model, token_ids

import kvcar
from kvcar.bundle import Bundle
from kvcar.errors import InputError
from kvcar.evaluate.fidelity import measure_fidelity
from kvcar.plan import Block
from kvcar.sizes import times_smaller


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


def coarse(model, trellis=True, **options):
    own = {"codec": "linear8", "metric": "effect", "times_smaller": 6, "max_page_cost": None}
    return fitted(model, trellis=trellis, **(own | options))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("means", [False, True])
def test_kernels_agree(family, means, monkeypatch):
    model, ids = tiny_model(family), token_ids(184, batch=2)
    bundle, found = coarse(model, page_means=means), {}
    for kernels in EVERY_KERNEL:
        monkeypatch.setenv("KVCAR_KERNELS", kernels)
        with kvcar.attach(model, bundle) as attached:
            found[kernels] = logits(model, ids, attached.new_cache())
    assert max(error(each, found["naive"]) for each in found.values()) < 2e-3


def test_it_costs_less_in_as_many_bytes(llama):
    kl = {}
    for trellis in (False, True):
        bundle = coarse(llama, trellis)
        assert times_smaller(bundle.plan, 4096, 4) == pytest.approx(
            times_smaller(coarse(llama).plan, 4096, 4), rel=0.01
        )
        with kvcar.attach(llama, bundle) as attached:
            found = measure_fidelity(llama, token_ids(320, batch=4), {"x": attached.new_cache})["x"]
        kl[trellis] = found.kl_divergence.value
    assert kl[True] < 0.9 * kl[False]


def test_chunks_may_end_anywhere_in_a_page(llama):
    """Parts of a page go on where the branches of the tokens before left off, and cost no more than its whole."""
    ids, bundle = token_ids(300, batch=2), coarse(llama, window=0)
    with torch.no_grad():
        plain = llama(ids).logits
    costs = {}
    for sizes in ((64, 64, 64, 64, 44), (70, 1, 60, 1, 1, 50, 1, 116), (13,) * 23 + (1,), (1,) * 300):
        with kvcar.attach(llama, bundle) as attached:
            costs[sizes] = error(logits(llama, ids, attached.new_cache(), sizes), plain)
    assert max(costs.values()) < 1.5 * costs[(64, 64, 64, 64, 44)]


def test_a_cropped_cache_goes_on_as_one_that_never_had_more(llama):
    ids, bundle = token_ids(280, batch=2), coarse(llama, window=0)
    with kvcar.attach(llama, bundle) as attached:
        cropped, fresh = attached.new_cache(), attached.new_cache()
        logits(llama, ids, cropped, (64, 64, 22, 30, 40))
        cropped.crop(-70)
        logits(llama, ids, fresh, (64, 64, 22))
        with torch.no_grad():
            got, wanted = (llama(ids[:, 150:230], past_key_values=cache).logits for cache in (cropped, fresh))
    assert torch.equal(got, wanted)


def test_bundles_say_so_and_come_back(llama, tmp_path):
    bundle = coarse(llama)
    bundle.save_pretrained(tmp_path / "b")
    read = Bundle.from_pretrained(tmp_path / "b")
    assert all(block.trellis for block in read.plan.blocks)
    ids, found = token_ids(200), []
    for each in (bundle, read):
        with kvcar.attach(llama, each) as attached:
            found.append(logits(llama, ids, attached.new_cache(), (100, 100)))
    assert torch.equal(*found)


def test_where_it_makes_no_sense():
    with pytest.raises(InputError, match=r"trellis needs the linear8 codec, got 'linear'"):
        kvcar.Structure(trellis=True)
    with pytest.raises(ValueError, match="a trellis needs static scales"):
        Block(
            codec="linear8", slots=((0, 0, "key"),), groups=({"bits": 8, "count": 2},), scales="dynamic", trellis=True
        )
