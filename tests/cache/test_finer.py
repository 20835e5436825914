"""Pages that would cost too much are kept exactly, whatever is done to the cache."""

import copy

import pytest
import torch
from bundles import fitted
from stepped import EVERY_KERNEL, KERNELS, error, logits
from tiny import tiny_model, token_ids
from transformers import DynamicCache

import kvcar
from kvcar.cache.finer import FinerPages, FinerWrite
from kvcar.fit.page_costs import page_costs

TINY, PAGE = 1e-12, 32


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


def coarse(model, limit, **options):
    return fitted(model, codec="linear8", metric="effect", times_smaller=4, max_page_cost=limit, **options)


def typical_limit(model, ids, **options):
    """A limit that about half of the pages are beyond."""
    return float(page_costs(model, coarse(model, 1e9, **options), ids).median())


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("window", [32, 0])
def test_with_all_pages_finer_the_model_says_what_it_does_without(kernels, family, window, monkeypatch):
    monkeypatch.setenv("KVCAR_KERNELS", kernels)
    model, ids = tiny_model(family), token_ids(184, batch=2)
    expected = logits(model, ids, DynamicCache(config=model.config))
    found = {}
    for limit in (TINY, None):
        with kvcar.attach(model, coarse(model, limit, window=window)) as attached:
            cache = attached.new_cache()
            found[limit] = error(logits(model, ids, cache), expected)
            assert cache.finer_page_share() == (1.0 if limit else 0.0)
            assert (cache.stored_bytes_by_part()["finer"] > 0) == (limit is not None)
    assert found[TINY] < 2e-3 < found[None]


def test_kernels_agree_where_some_pages_of_some_sequences_are_finer(llama, monkeypatch):
    ids, found = token_ids(184, batch=3), {}
    bundle = coarse(llama, typical_limit(llama, ids))
    for kernels in EVERY_KERNEL:
        monkeypatch.setenv("KVCAR_KERNELS", kernels)
        with kvcar.attach(llama, bundle) as attached:
            cache = attached.new_cache()
            found[kernels] = logits(llama, ids, cache)
            assert 0.1 < cache.finer_page_share() < 0.9
    # Sums in another order round a latent to its neighbouring code now and then; tests/kernels compares attention alone.
    assert max(error(each, found["naive"]) for each in found.values()) < 0.1


def test_decoded_pages_give_the_same(llama):
    ids = token_ids(184, batch=2)
    limit = typical_limit(llama, ids)
    bundle = coarse(llama, limit)
    with kvcar.attach(llama, bundle):
        a, b = (logits(llama, ids, kvcar.KVCarCache(bundle, keep_decoded=kept)) for kept in (True, False))
    assert error(a, b) < 0.02


def test_padding_sinks_and_finer_pages(llama):
    """Rows padded by different amounts say what each says alone."""
    ids, lengths = token_ids(184, batch=2), (184, 150)
    bundle = coarse(llama, typical_limit(llama, ids))
    mask = torch.ones_like(ids)
    mask[1, : 184 - 150] = 0
    with kvcar.attach(llama, bundle) as attached, torch.no_grad():
        cache = attached.new_cache()
        position = torch.arange(184)[None] - torch.tensor([[0], [34]])
        given = {"attention_mask": mask[:, :150], "position_ids": position[:, :150].clamp_min(0)}
        llama(ids[:, :150], past_key_values=cache, **given)
        got = llama(ids[:, 150:], attention_mask=mask, position_ids=position[:, 150:], past_key_values=cache).logits
        assert cache.finer_page_share() > 0
        for row, length in enumerate(lengths):
            own = attached.new_cache()
            llama(ids[row : row + 1, 184 - length : 150], past_key_values=own)
            alone = llama(ids[row : row + 1, 150:], past_key_values=own).logits
            # Pages begin elsewhere in a padded row, so others of them may be finer.
            assert error(got[row], alone[0]) < 0.5


def test_what_is_done_to_a_cache_is_done_to_its_finer_pages(llama):
    ids = token_ids(184, batch=3)
    bundle, step = coarse(llama, typical_limit(llama, ids)), token_ids(1, batch=3, seed=5)
    with kvcar.attach(llama, bundle) as attached, torch.no_grad():
        cache = attached.new_cache()
        logits(llama, ids, cache)
        expected = llama(step, past_key_values=copy.deepcopy(cache)).logits
        picked, repeated, selected = cache.fork(), cache.fork(), cache.fork()
        picked.reorder_cache(torch.tensor([2, 0, 1]))
        repeated.batch_repeat_interleave(2)
        selected.batch_select_indices(torch.tensor([1]))
        order = [2, 0, 1]
        torch.testing.assert_close(llama(step[order], past_key_values=picked).logits, expected[order])
        twice = step.repeat_interleave(2, 0)
        torch.testing.assert_close(llama(twice, past_key_values=repeated).logits, expected.repeat_interleave(2, 0))
        torch.testing.assert_close(llama(step[1:2], past_key_values=selected).logits, expected[1:2])
        torch.testing.assert_close(llama(step, past_key_values=cache).logits, expected)


@pytest.mark.parametrize("window", [32, 0])
@pytest.mark.parametrize("kept", [64, 75, 100, 150])
def test_cropped_it_goes_on_as_if_it_had_never_been_longer(llama, kept, window):
    ids, other = token_ids(184, batch=2), token_ids(184, batch=2, seed=8)
    bundle = coarse(llama, TINY, window=window)
    expected = logits(
        llama, torch.cat([ids[:, :kept], other], 1)[:, : kept + 110], DynamicCache(config=llama.config), (kept, 109, 1)
    )
    with kvcar.attach(llama, bundle) as attached, torch.no_grad():
        cache = attached.new_cache()
        logits(llama, ids, cache)
        fork = cache.fork()
        cache.crop(kept - cache.tokens)
        got = torch.cat([llama(part, past_key_values=cache).logits for part in other[:, :110].split((109, 1), 1)], 1)
        assert error(got, expected[:, kept:]) < 3e-3
        again, whole = token_ids(1, batch=2, seed=5), DynamicCache(config=llama.config)
        llama(ids, past_key_values=whole)
        assert error(llama(again, past_key_values=fork).logits, llama(again, past_key_values=whole).logits) < 3e-3


def test_tokens_that_are_cropped_leave_nothing_behind(llama):
    bundle, ids = coarse(llama, TINY), token_ids(140, batch=2)
    given = llama.get_input_embeddings()(ids).detach()
    given[1, 75:] = torch.nan
    with kvcar.attach(llama, bundle) as attached, torch.no_grad():
        cache, clean = attached.new_cache(), attached.new_cache()
        llama(inputs_embeds=given[:, :75], past_key_values=cache)
        llama(inputs_embeds=given[:, 75:], past_key_values=cache)
        cache.crop(72 - 140)
        llama(ids[:, :72], past_key_values=clean)
        again = token_ids(60, batch=2, seed=4)
        got, expected = (llama(again, past_key_values=each).logits for each in (cache, clean))
        assert error(got, expected) < 3e-3
        cache.crop(-cache.tokens)
        assert cache.batch_size == -1
        assert llama(ids[:1], past_key_values=cache).logits.isfinite().all()


@pytest.mark.parametrize("ways", [(300,), (7,) * 42 + (6,), (75, 225), (130, 170), (70, 230)], ids=str)
def test_the_way_to_a_text_does_not_decide_which_pages_are_finer(llama, ways):
    """One token again and again costs more than its errors alone, wherever passes begin and end."""
    ids = torch.full((1, 300), 17)
    costs = page_costs(llama, coarse(llama, 1e9), ids)
    bundle = coarse(llama, float(costs[2:].min()) * 0.9)
    with kvcar.attach(llama, bundle) as attached, torch.no_grad():
        cache = attached.new_cache()
        for part in ids.split(ways, dim=1):
            llama(part, past_key_values=cache)
        assert cache._finer.pages[-6:] == (2, 3, 4, 5, 6, 7)
        cropped = cache.fork()
        cropped.crop(101 - 300)
        llama(ids[:, :190], past_key_values=cropped)
        assert {4, 5, 6, 7} <= set(cropped._finer.pages)


def test_which_pages_are_finer():
    costs = torch.zeros(2, 100)
    costs[0, 40] = 100.0
    none = FinerPages.none(2, PAGE, torch.device("cpu"))
    finer, writes = none.after(costs, 0, 100, 1.0)
    assert finer.pages == (1,)
    assert finer.shown.tolist() == [[0], [PAGE]]
    assert writes == [FinerWrite(0, PAGE, PAGE)]
    assert finer.visible(torch.tensor([0, 0]), 100).sum(-1).tolist() == [PAGE, 0]
    assert finer.visible(torch.tensor([34, 0]), 100).sum(-1).tolist() == [30, 0]
    assert finer.after(costs, 0, 100, None)[0].pages == (1,)
    assert none.after(None, 0, 100, 1.0) == (none, [])


def test_what_a_page_costs_adds_up_token_by_token():
    """As without a window: the page is finer from the token on that brings it over the limit."""
    finer = FinerPages.none(1, PAGE, torch.device("cpu"))
    for token in range(2 * PAGE):
        finer, writes = finer.after(torch.full((1, 1), 0.1 if token < PAGE else 2.0), token, 1, 1.0)
        assert bool(writes) == (token >= PAGE + 16)
    assert finer.pages == (1,)
    assert finer.shown.tolist() == [[16]]
    assert finer.cropped(PAGE + 5).pages == (1,)
    assert finer.cropped(PAGE).pages == ()


@pytest.mark.parametrize(("costliest", "bad"), [(2.4, False), (2.6, True)])
def test_a_page_with_one_token_that_costs_far_more_is_finer(costliest, bad):
    costs = torch.full((2, 2 * PAGE), 0.01)
    costs[1, PAGE + 7] = costliest
    whole, _ = FinerPages.none(2, PAGE, torch.device("cpu")).after(costs, 0, 2 * PAGE, 1.0)
    assert whole.pages == ((1,) if bad else ())
    in_steps = FinerPages.none(2, PAGE, torch.device("cpu"))
    for token in range(2 * PAGE):
        in_steps, _ = in_steps.after(costs[:, token : token + 1], token, 1, 1.0)
    assert in_steps.pages == whole.pages
    if bad:
        assert whole.shown.tolist() == [[PAGE], [0]]
        assert in_steps.shown.tolist() == [[PAGE], [7]]


def test_a_fit_sets_the_limit_so_that_no_page_of_its_kind_is_finer(llama):
    bundle = fitted(llama, codec="linear8", metric="effect", times_smaller=4)
    limit = bundle.plan.cache.max_page_cost
    assert isinstance(limit, float)
    with kvcar.attach(llama, bundle) as attached:
        cache = attached.new_cache()
        logits(llama, token_ids(184, batch=2), cache)
    assert cache.finer_page_share() == 0
    assert fitted(llama, bits=4).plan.cache.max_page_cost == "auto"  # this codec does not know


@pytest.mark.parametrize("page_tokens", [32, 96])
def test_passes_that_fill_no_page_have_no_cost_of_a_page(llama, page_tokens):
    bundle = coarse(llama, 1e9, window=0, page_tokens=page_tokens)
    assert len(page_costs(llama, bundle, token_ids(100))) == (3 if page_tokens == 32 else 0)


@pytest.mark.parametrize("wrong", [0, -1.0, float("nan"), float("inf"), "0.05", True, 10**400, [1.0, 2.0]])
def test_a_limit_that_is_none_is_refused(wrong):
    with pytest.raises(kvcar.KVCarError, match="max_page_cost must be a number of nats above 0"):
        kvcar.CacheConfig(max_page_cost=wrong)


@pytest.mark.parametrize("period", [1, 2, 3, 4])
def test_errors_that_come_in_turns_cost_more_than_as_many_that_do_not(llama, period):
    coded = next(block for block in coarse(llama, None).blocks if block.codec is not None)
    draw = torch.Generator().manual_seed(0)
    errors = torch.randn(10 * PAGE, coded.codec.mean.numel(), generator=draw, dtype=torch.float32)
    alone = float(coded.codec.error_cost(errors).mean())
    assert float(coded.cost(errors, PAGE).mean()) == pytest.approx(alone, rel=0.4)
    turns = torch.cat([errors[:period].repeat(PAGE, 1)[:PAGE] for _ in range(10)])
    own = float(coded.codec.error_cost(turns).mean())
    assert float(coded.cost(turns, PAGE).mean()) > (PAGE / period) * own / 2
    # By the formula: independent ones, common ones, and what is left of those in turns.
    page = errors[:PAGE]
    in_turns = [
        PAGE // p * coded.codec.error_cost(page[: PAGE // p * p].unflatten(0, (-1, p)).mean(0)).mean()
        for p in (1, 2, 3, 4)
    ]
    mean = coded.codec.error_cost(page).mean()
    left = max(0.0, *(float(c - in_turns[0] / p - mean * (1 - 1 / p)) for p, c in enumerate(in_turns, 1)))
    expected = coded.codec.error_cost(page) + (in_turns[0] - mean) / 2 + 2 * left
    torch.testing.assert_close(coded.cost(page, PAGE), expected, rtol=1e-4, atol=1e-9)
