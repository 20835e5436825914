"""Pages that store what the errors of their tokens have in common."""

import copy

import pytest
import torch
from bundles import fitted
from stepped import EVERY_KERNEL, error, logits
from tiny import tiny_model, token_ids
from transformers import DynamicCache

import kvcar
from kvcar.bundle import Bundle
from kvcar.errors import BundleError, InputError
from kvcar.layout import MEAN_STEP_BYTES, page_layout
from kvcar.sizes import times_smaller


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


def coarse(model, **options):
    return fitted(
        model, codec="linear8", metric="effect", times_smaller=6, page_means=True, max_page_cost=None, **options
    )


def all_means(cache):
    """Bytes of the means of all pages that hold tokens."""
    return [unit.means for unit in cache._pages.contents()]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_kernels_agree(family, monkeypatch):
    model, ids = tiny_model(family), token_ids(184, batch=2)
    bundle, found = coarse(model), {}
    for kernels in EVERY_KERNEL:
        monkeypatch.setenv("KVCAR_KERNELS", kernels)
        with kvcar.attach(model, bundle) as attached:
            found[kernels] = logits(model, ids, attached.new_cache())
    assert max(error(each, found["naive"]) for each in found.values()) < 2e-3


def test_a_page_is_read_better_with_its_mean(llama):
    """Text of one token: what its errors have in common is nearly all of them."""
    ids = torch.cat([token_ids(8), torch.full((1, 184), 7)], dim=1)
    expected, found = logits(llama, ids, DynamicCache(config=llama.config)), {}
    for means in (True, False):
        bundle = fitted(llama, codec="linear8", metric="effect", times_smaller=6, page_means=means, max_page_cost=None)
        with kvcar.attach(llama, bundle) as attached:
            found[means] = error(logits(llama, ids, attached.new_cache()), expected)
    assert found[True] < 0.8 * found[False]


def test_a_decoded_copy_is_what_the_kernels_read(llama):
    ids, bundle = token_ids(184, batch=2), coarse(llama)
    with kvcar.attach(llama, bundle) as attached:
        expected = logits(llama, ids, attached.new_cache())
        assert error(logits(llama, ids, kvcar.KVCarCache(bundle, keep_decoded=True)), expected) < 2e-3


def test_padding_does_not_enter_a_mean(llama):
    ids = token_ids(184)
    padded = torch.cat([torch.full((1, 32), 3), ids], dim=1)
    mask = torch.cat([torch.zeros(1, 32, dtype=torch.long), torch.ones_like(ids)], dim=1)
    with kvcar.attach(llama, coarse(llama)) as attached, torch.no_grad():
        alone, beside = attached.new_cache(), attached.new_cache()
        expected = llama(ids, past_key_values=alone).logits
        got = llama(padded, attention_mask=mask, past_key_values=beside).logits[:, 32:]
        assert error(got, expected) < 1e-5
        for own, other in zip(all_means(alone), all_means(beside), strict=True):
            # A page later, and the first one, of padding alone, has none.
            assert torch.equal(other[:, 1 : own.shape[1] + 1], own)
            assert not other[:, 0, :MEAN_STEP_BYTES].any()


@pytest.mark.parametrize("left", [100, 97, 64, 33])
def test_a_page_that_is_cut_off_and_filled_again_is_right_to_its_end(llama, left):
    """Its first tokens are read with the mean that they were stored with; those after it must be too."""
    ids, other = token_ids(160), token_ids(160, seed=5)
    with kvcar.attach(llama, coarse(llama, window=0)) as attached, torch.no_grad():
        cache, plain = attached.new_cache(), DynamicCache(config=llama.config)
        llama(ids, past_key_values=cache)
        llama(ids, past_key_values=plain)
        cache.crop(left - 160)
        plain.crop(left - 160)
        llama(other[:, :40], past_key_values=cache)
        llama(other[:, :40], past_key_values=plain)
        got, expected = (llama(other[:, 40:60], past_key_values=c).logits for c in (cache, plain))
        fresh = attached.new_cache()
        llama(torch.cat([ids[:, :left], other[:, :40]], dim=1), past_key_values=fresh)
        usual = error(llama(other[:, 40:60], past_key_values=fresh).logits, expected)
        assert error(got, expected) < 1.5 * usual + 0.02


def test_forks_batches_and_orders_keep_them(llama):
    ids = token_ids(200, batch=3)
    with kvcar.attach(llama, coarse(llama)) as attached, torch.no_grad():
        cache = attached.new_cache()
        llama(ids[:, :180], past_key_values=cache)
        expected = llama(ids[:, 180:], past_key_values=copy.deepcopy(cache)).logits
        cache.reorder_cache(torch.tensor([2, 0, 1]))
        got = llama(ids[[2, 0, 1], 180:], past_key_values=cache).logits
        assert error(got, expected[[2, 0, 1]]) < 1e-5


def test_their_bytes_are_counted(llama):
    with kvcar.attach(llama, coarse(llama)) as attached, torch.no_grad():
        cache = attached.new_cache()
        llama(token_ids(200), past_key_values=cache)
        assert cache.stored_bytes() == sum(cache.stored_bytes_by_part().values())
    plan = coarse(llama).plan
    without = coarse_without(llama).plan
    width = len(plan.blocks[0].slots) * plan.geometry.head_dim
    more = page_layout(plan, 4).page_bytes - page_layout(without, 4).page_bytes
    assert more == pytest.approx(len(plan.blocks) * (width / 4 + 2), abs=16 * len(plan.blocks))
    assert times_smaller(plan, 4) == pytest.approx(6, rel=0.05)


def test_a_bundle_keeps_them(llama, tmp_path):
    bundle = coarse(llama)
    read = Bundle.from_pretrained(bundle.save_pretrained(tmp_path / "b"))
    assert read.plan == bundle.plan
    assert all(block.page_means for block in read.plan.blocks)
    assert read.digest == bundle.digest != coarse_without(llama).digest


def coarse_without(model):
    bundle = coarse(model)
    blocks = tuple(block.model_copy(update={"page_means": False}) for block in bundle.plan.blocks)
    return Bundle(
        bundle.plan.model_copy(update={"blocks": blocks}), bundle.blocks, bundle.fingerprint, bundle.model, bundle.fit
    )


def test_codecs_that_do_not_know_what_errors_cost_have_none(llama, tmp_path):
    with pytest.raises(InputError, match=r"page_means needs the linear8 codec.*'linear'"):
        kvcar.Structure(page_means=True)
    folder = fitted(llama, times_smaller=4).save_pretrained(tmp_path / "b")
    plan = folder / "plan.json"
    # By way of the code that checks it, as the file is under a checksum.
    bundle = Bundle.from_pretrained(folder)
    assert plan.exists()
    wrong = bundle.plan.blocks[0].model_copy(update={"page_means": True})
    with pytest.raises(BundleError, match="no mean errors of the linear codec"):
        bundle.blocks[0].on(torch.device("cpu"), wrong, bundle.plan)
