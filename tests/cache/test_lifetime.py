"""What caches and attachments share, and when they go."""

import copy
import gc
import threading
import weakref

import pytest
import torch
from bundles import by_hand, exact, fitted
from tiny import tiny_model, token_ids

import kvcar
from kvcar.cache.attach import attachment_of
from kvcar.cache.cache import KVCarCache
from kvcar.errors import CacheStateError, InputError
from kvcar.geometry import Slot


def filled(model, bundle, tokens, batch=1, window=None):
    cache = KVCarCache(bundle, window)
    with torch.no_grad():
        model(input_ids=token_ids(tokens, batch), past_key_values=cache)
    return cache


def go_on(model, cache, count, seed):
    with torch.no_grad():
        return model(input_ids=token_ids(count, cache.batch_size, seed), past_key_values=cache).logits


@pytest.mark.parametrize("cropped", [0, 1, 90, 150])
def test_a_fork_and_its_origin_do_not_change_each_other(cropped):
    model = tiny_model("llama")
    bundle = fitted(model, times_smaller=3)
    with kvcar.attach(model, bundle):
        origin, twin = filled(model, bundle, 300), filled(model, bundle, 300)
        fork = origin.fork()
        before = [arena.clone() for arena in fork._pages.arenas]
        if cropped:
            origin.crop(-cropped)
            twin.crop(-cropped)
        torch.testing.assert_close(go_on(model, origin, 200, 5), go_on(model, twin, 200, 5), atol=0, rtol=0)
        assert all(torch.equal(a, b) for a, b in zip(fork._pages.arenas, before, strict=True))
        alone = filled(model, bundle, 300)
        torch.testing.assert_close(go_on(model, fork, 200, 6), go_on(model, alone, 200, 6), atol=0, rtol=0)


def test_a_fork_shares_pages_until_one_of_the_two_writes_to_them():
    model = tiny_model("llama")
    bundle = fitted(model, times_smaller=3)
    with kvcar.attach(model, bundle):
        origin = filled(model, bundle, 200)
        fork = origin.fork()
        assert all(a is b for a, b in zip(origin._pages.arenas, fork._pages.arenas, strict=True))
        go_on(model, fork, 64, 1)
        assert any(a is not b for a, b in zip(origin._pages.arenas, fork._pages.arenas, strict=False))


def test_threads_on_one_attached_model_each_have_their_own_cache():
    model = tiny_model("llama")
    bundle = by_hand(model, [tuple(Slot(i, h, k) for h in (0, 1) for k in ("key", "value")) for i in range(4)])
    prompts = [token_ids(40 + 25 * i, seed=i) for i in range(4)]
    got, wrong = {}, []

    def run(index):
        try:
            got[index] = model.generate(prompts[index], max_new_tokens=40, do_sample=False)
        except BaseException as error:
            wrong.append(error)

    with kvcar.attach(model, bundle):
        expected = [model.generate(prompt, max_new_tokens=40, do_sample=False) for prompt in prompts]
        for _ in range(3):
            threads = [threading.Thread(target=run, args=(i,)) for i in range(len(prompts))]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert not wrong
            assert all(torch.equal(got[i], expected[i]) for i in range(len(prompts)))


def test_a_model_that_is_dropped_while_attached_goes():
    model = tiny_model("llama")
    kvcar.attach(model, exact(model))
    assert attachment_of(model) is not None
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_equal_bundles_are_made_ready_once(tmp_path):
    model = tiny_model("llama")
    bundle = fitted(model, times_smaller=3)
    with kvcar.attach(model, bundle) as attached:
        again = type(bundle)(bundle.plan, bundle.blocks, bundle.fingerprint, bundle.model, bundle.fit)
        assert attached.coder(again) is attached.coder(bundle)


def test_attaching_says_in_one_line_what_was_attached(caplog):
    model = tiny_model("gemma3")
    bundle = fitted(model, bits=4, layers=(1,))
    with caplog.at_level("INFO", logger="kvcar"), kvcar.attach(model, bundle):
        lines = [record.getMessage() for record in caplog.records if "attached" in record.getMessage()]
    assert len(lines) == 1
    for part in (
        "at 512 tokens 1.40 times smaller than the full cache (bfloat16)",
        "codecs of 0.0 MB",
        "kernels: ",
        "exact layers: 0, 2, 3",
    ):
        assert part in lines[0]


def test_one_cache_is_not_for_two_threads_at_once():
    model = tiny_model("llama")
    bundle = fitted(model, times_smaller=3)
    inside, go_on_now, found = threading.Event(), threading.Event(), []

    def wait(*_):
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            go_on_now.wait(10)

    with kvcar.attach(model, bundle):
        cache, twin = filled(model, bundle, 150), filled(model, bundle, 150)
        expected = go_on(model, twin, 5, 1)
        handle = model.model.layers[1].register_forward_pre_hook(wait)
        thread = threading.Thread(target=lambda: found.append(go_on(model, cache, 5, 1)))
        thread.start()
        assert inside.wait(10)
        with pytest.raises(CacheStateError, match="another thread is in a pass over this cache"):
            go_on(model, cache, 5, 1)
        go_on_now.set()
        thread.join()
        handle.remove()
        assert torch.equal(found[0], expected)
        assert cache.tokens == 155
        assert torch.equal(go_on(model, cache, 1, 2), go_on(model, twin, 1, 2))


def test_a_pass_that_breaks_off_in_a_thread_lets_others_go_on():
    model = tiny_model("llama")
    bundle = fitted(model, times_smaller=3)
    failed = []

    def run(cache):
        try:
            go_on(model, cache, 5, 1)
        except ZeroDivisionError as error:
            failed.append(error)

    with kvcar.attach(model, bundle):
        cache, twin = filled(model, bundle, 150), filled(model, bundle, 150)
        handle = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
        thread = threading.Thread(target=run, args=(cache,))
        thread.start()
        thread.join()
        handle.remove()
        assert failed
        assert torch.equal(go_on(model, cache, 5, 1), go_on(model, twin, 5, 1))


def test_a_shallow_copy_is_a_fork_too():
    model = tiny_model("llama")
    bundle = fitted(model, times_smaller=3)
    with kvcar.attach(model, bundle):
        cache, twin = filled(model, bundle, 150), filled(model, bundle, 150)
        go_on(model, copy.copy(cache), 90, 3)
        assert torch.equal(go_on(model, cache, 1, 1), go_on(model, twin, 1, 1))


CHANGES = {
    "a beam that is not there": lambda cache: cache.reorder_cache(torch.tensor([0, 2])),
    "no sequence": lambda cache: cache.batch_select_indices(torch.tensor([], dtype=torch.int64)),
    "no sequence of a mask": lambda cache: cache.batch_select_indices(torch.tensor([False, False])),
    "a mask of another batch": lambda cache: cache.batch_select_indices(torch.tensor([True])),
    "a number that is not whole": lambda cache: cache.batch_select_indices(torch.tensor([0.5])),
    "no times": lambda cache: cache.batch_repeat_interleave(0),
    "half a time": lambda cache: cache.batch_repeat_interleave(1.5),
    "a crop of nothing": lambda cache: cache.crop(None),
    "a crop of half a token": lambda cache: cache.crop(-1.5),
    "a crop of NaN": lambda cache: cache.crop(float("nan")),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_changes_that_cannot_be_are_refused_and_change_nothing(family, change):
    model = tiny_model(family)
    bundle = fitted(model, bits=6)
    with kvcar.attach(model, bundle):
        cache, twin = filled(model, bundle, 150, 2), filled(model, bundle, 150, 2)
        with pytest.raises(InputError):
            change(cache)
        assert torch.equal(go_on(model, cache, 1, 1), go_on(model, twin, 1, 1))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_sequences_are_selected_by_lists_masks_and_from_the_end(family):
    model = tiny_model(family)
    bundle = fitted(model, bits=6)
    ways = [
        torch.tensor([1]),
        [1],
        torch.tensor([False, True]),
        torch.tensor([-1]),
        torch.tensor([1], dtype=torch.int32),
    ]
    with kvcar.attach(model, bundle):
        found = []
        for way in ways:
            cache = filled(model, bundle, 150, 2)
            cache.batch_select_indices(way)
            found.append(go_on(model, cache, 1, 1))
    assert all(torch.equal(each, found[0]) for each in found)


@pytest.mark.parametrize(("first", "then"), [("bfloat16", "float16"), ("float32", "bfloat16"), ("bfloat16", "float32")])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_cache_does_not_go_on_in_another_dtype(family, first, then):
    model, ids = tiny_model(family).to(getattr(torch, first)), token_ids(120)
    bundle = fitted(model, codec="identity", page_tokens=32, window=32)
    other = copy.deepcopy(model).to(getattr(torch, then))
    with kvcar.attach(model, bundle) as attached, kvcar.attach(other, bundle), torch.no_grad():
        cache = attached.new_cache()
        model(ids[:, :70], past_key_values=cache)
        with pytest.raises(CacheStateError, match=f"filled in torch.{first} .* computes in torch.{then}"):
            other(ids[:, 70:], past_key_values=cache)
        with pytest.raises(CacheStateError, match="filled in"):
            other(ids[:, 70:], past_key_values=cache.fork())
        rest = model(ids[:, 70:], past_key_values=cache).logits
        whole = model(ids, past_key_values=attached.new_cache()).logits[:, 70:]
        torch.testing.assert_close(rest, whole, rtol=0.1, atol=0.2)
        cache.reset()
        other(ids[:, :70], past_key_values=cache)
        assert cache.tokens == 70


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("options", [{"codec": "identity"}, {"times_smaller": 3}], ids=["lossless", "coded"])
def test_a_cache_goes_on_over_another_attachment_of_the_same_weights(family, options):
    model, ids = tiny_model(family), token_ids(150)
    bundle, other = fitted(model, window=0, **options), copy.deepcopy(model)
    with kvcar.attach(model, bundle) as attached, torch.no_grad():
        cache = attached.new_cache()
        model(ids[:, :70], past_key_values=cache)
        again, kept = cache.fork(), cache.fork()
        expected = [model(part, past_key_values=cache).logits for part in ids[:, 70:].split(9, dim=1)]
    with kvcar.attach(model, bundle), kvcar.attach(other, bundle), torch.no_grad():
        for own, fork in ((model, again), (other, kept)):
            got = [own(part, past_key_values=fork).logits for part in ids[:, 70:].split(9, dim=1)]
            assert torch.equal(torch.cat(got, dim=1), torch.cat(expected, dim=1))


def test_a_cache_says_whether_it_has_tokens():
    model, ids = tiny_model("llama"), token_ids(40)
    with kvcar.attach(model, kvcar.lossless(model)) as attached, torch.no_grad():
        cache = attached.new_cache()
        assert not cache.is_initialized
        model(ids, past_key_values=cache)
        assert cache.is_initialized
        assert cache.fork().is_initialized
        cache.reset()
        assert not cache.is_initialized


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_model_that_changes_its_dtype_does_not_go_on_with_its_caches(family):
    model, ids = tiny_model(family), token_ids(80)
    with kvcar.attach(model, fitted(model, times_smaller=3)) as attached, torch.no_grad():
        cache = attached.new_cache()
        model(ids, past_key_values=cache)
        model.bfloat16()
        with pytest.raises(CacheStateError, match=r"filled in torch.float32 .* computes in torch.bfloat16"):
            model(ids[:, :1], past_key_values=cache)
        model.float()
        model(ids[:, :1], past_key_values=cache)
        assert cache.tokens == 81
