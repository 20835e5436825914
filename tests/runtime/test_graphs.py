"""Decode steps that are captured once and replayed say, and store, what steps of their own do."""

import gc
import logging
from weakref import ref

import pytest
import torch
from bundles import by_hand, fitted
from tiny import tiny_model, token_ids
from triton_device import DEVICE

import kvcar
from kvcar.errors import InputError
from kvcar.runtime.attach import attachment_of
from kvcar.runtime.cache import KVCarCache
from kvcar.runtime.graphs import steps as graph_steps
from kvcar.runtime.graphs.steps import table_pages
from kvcar.shapes import Slot

if DEVICE == "cpu":
    from recorded_steps import RecordedCapture


PAGE = 32
TOLERANCE = 2e-4


@pytest.fixture
def capture(monkeypatch):
    """How steps are captured: as CUDA graphs where there is a GPU, recorded elsewhere."""
    monkeypatch.setenv("KVCAR_KERNELS", "triton")
    return RecordedCapture(monkeypatch) if DEVICE == "cpu" else None


@pytest.fixture
def plainly(monkeypatch):
    """Runs steps by PyTorch's kernels, which are faster than interpreted ones."""

    def run(work):
        with monkeypatch.context() as context:
            context.setenv("KVCAR_KERNELS", "torch")
            return work()

    return run


def model_and_bundle(family="llama", **options):
    model = tiny_model(family, **({"n_layer": 2} if family == "gpt2" else {"num_hidden_layers": 2})).to(DEVICE)
    return model, fitted(model, **({"times_smaller": 3, "layers_per_block": 2} | options))


def ids(count, seed=0, batch=1):
    return token_ids(count, seed=seed, batch=batch).to(DEVICE)


@torch.no_grad()
def prefill(model, cache, prompt, mask=None):
    return model(input_ids=prompt, past_key_values=cache, use_cache=True, attention_mask=mask).logits[:, -1]


@torch.no_grad()
def steps(model, cache, following, **more):
    given = {"past_key_values": cache, "use_cache": True} | more
    return torch.cat([model(token[:, None], **given).logits for token in following.unbind(1)], 1)


def same(got, expected):
    torch.testing.assert_close(got, expected, atol=TOLERANCE, rtol=TOLERANCE)


def check_same_contents(cache, other):
    assert (cache.tokens, cache.paged_tokens, cache.pages) == (other.tokens, other.paged_tokens, other.pages)
    for layer, held in cache.coded_layers.items():
        for mine, its in zip(held.kept(), other.coded_layers[layer].kept(), strict=True):
            # Rounded to bfloat16, which makes more of small differences.
            torch.testing.assert_close(mine, its, atol=TOLERANCE, rtol=2.0**-7)
    for mine, its in zip(cache.arenas, other.arenas, strict=True):
        assert (mine != its).float().mean() < 1e-3  # a code on an edge may fall to either side


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_replayed_steps_say_and_store_the_same(capture, plainly, family):
    """A page leaves the window meanwhile, and the table of pages has to grow."""
    model, bundle = model_and_bundle(family)
    prompt, following = ids(9 * PAGE + 28), ids(7, seed=5)
    with kvcar.attach(model, bundle) as attachment:
        other, cache = KVCarCache(bundle), KVCarCache(bundle)
        prefill(model, other, prompt)
        prefill(model, cache, prompt)
        expected = plainly(lambda: steps(model, other, following))
        attachment.capture_steps(capture)
        same(steps(model, cache, following), expected)
    assert cache.pages == 9 > table_pages(8)
    check_same_contents(cache, other)
    if DEVICE == "cpu":
        assert (capture.captures, capture.replays) == (2, following.shape[1])
        # Exact tokens, scores, sums, merging: of every layer, however many heads and blocks it has.
        assert capture.launches == 4 * model.config.num_hidden_layers


def all_coded(model, **plan):
    slots = [tuple(Slot(layer, head, kind) for layer in (0, 1) for head in (0, 1)) for kind in ("key", "value")]
    return by_hand(model, slots, **plan)


@pytest.mark.parametrize(("window", "start"), [(PAGE, 2 * PAGE - 3), (0, PAGE - 3)], ids=["window", "no window"])
def test_from_before_there_are_whole_pages_on(capture, plainly, window, start):
    """With a window there are neither pages nor sinks at first; without one every token goes to a page that is partly filled."""
    model, _ = model_and_bundle()
    bundle = all_coded(model, exact_dtype="model")
    prompt, following = ids(start), ids(5, seed=5)
    with kvcar.attach(model, bundle) as attachment:
        other, cache = KVCarCache(bundle, window), KVCarCache(bundle, window)
        prefill(model, other, prompt)
        prefill(model, cache, prompt)
        expected = plainly(lambda: steps(model, other, following))
        attachment.capture_steps(capture)
        with torch.inference_mode():
            first = steps(model, cache, following[:, :2])
        same(torch.cat([first, steps(model, cache, following[:, 2:])], 1), expected)
    assert cache.pages == (1 if window else 2)
    check_same_contents(cache, other)
    assert DEVICE != "cpu" or capture.replays == 5


@pytest.mark.parametrize(
    "start", [2 * PAGE - 2, 6 * PAGE - 2, 10 * PAGE - 2], ids=["no page", "few pages", "a table to grow"]
)
def test_pages_are_chosen_on_the_device(capture, plainly, start):
    """A number for each layer; one sequence is padded, by a page and a half."""
    model, bundle = model_and_bundle()
    prompt, following = ids(start, batch=2), ids(4, seed=5, batch=2)
    mask = torch.ones(2, start + 4, dtype=torch.int64, device=DEVICE)
    mask[1, : PAGE + 16] = 0
    with kvcar.attach(model, bundle) as attachment:
        other, cache = (KVCarCache(bundle, attend_pages=(2, 5)) for _ in range(2))
        prefill(model, other, prompt, mask[:, :start])
        prefill(model, cache, prompt, mask[:, :start])
        expected = plainly(lambda: steps(model, other, following))
        attachment.capture_steps(capture)
        same(steps(model, cache, following), expected)
    assert cache.pages == start // PAGE
    check_same_contents(cache, other)
    assert DEVICE != "cpu" or capture.replays == 4


def test_a_loaded_cache_summarises_its_pages_first(capture, plainly, tmp_path):
    model, bundle = model_and_bundle()
    following = ids(2, seed=5)
    with kvcar.attach(model, bundle) as attachment:
        cache = KVCarCache(bundle)
        prefill(model, cache, ids(6 * PAGE))
        cache.save(tmp_path / "context", keep_window=True)
        other, loaded = (KVCarCache.load(tmp_path / "context", model, bundle, attend_pages=2) for _ in range(2))
        expected = plainly(lambda: steps(model, other, following))
        attachment.capture_steps(capture)
        same(steps(model, loaded, following), expected)
    check_same_contents(loaded, other)


def test_generation_of_a_padded_batch(capture, plainly):
    """Left padding longer than a page, so that sinks of one sequence form later; ``generate`` passes masks and positions."""
    model, bundle = model_and_bundle()
    prompt = ids(3 * PAGE - 2, batch=2)
    mask = torch.ones_like(prompt)
    mask[1, : PAGE + 5] = 0
    given = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    given |= {"output_logits": True, "return_dict_in_generate": True}
    with kvcar.attach(model, bundle) as attachment:
        other, cache = KVCarCache(bundle), KVCarCache(bundle)
        expected = plainly(lambda: model.generate(prompt, past_key_values=other, **given))
        attachment.capture_steps(capture)
        got = model.generate(prompt, past_key_values=cache, **given)
    assert torch.equal(got.sequences, expected.sequences)
    same(torch.stack(got.logits), torch.stack(expected.logits))
    check_same_contents(cache, other)
    assert DEVICE != "cpu" or capture.replays == 5


def test_caches_take_turns_and_change_between_steps(capture, plainly):
    """Two caches in one memory; one is cropped and goes on, then its sequences are reordered."""
    model, bundle = model_and_bundle()
    prompts, following = [ids(70, seed, batch=2) for seed in (1, 2)], ids(4, seed=5, batch=2)

    def turns(caches):
        said = []
        for cache, prompt in zip(caches, prompts, strict=True):
            prefill(model, cache, prompt)
        for token in following.split(1, dim=1):
            said += [steps(model, cache, token) for cache in caches]
        caches[0].crop(-2)
        said += [steps(model, cache, following[:, :1]) for cache in caches]
        caches[1].reorder_cache(torch.tensor([1, 1], device=DEVICE))
        said += [steps(model, cache, following[:, 1:2]) for cache in caches]
        return torch.cat(said, 1)

    with kvcar.attach(model, bundle) as attachment:
        others, caches = ([KVCarCache(bundle) for _ in prompts] for _ in range(2))
        expected = plainly(lambda: turns(others))
        attachment.capture_steps(capture)
        same(turns(caches), expected)
    for cache, other in zip(caches, others, strict=True):
        check_same_contents(cache, other)
    assert DEVICE != "cpu" or capture.captures == 1


def test_pages_of_a_cache_that_is_gone_are_freed(capture):
    model, bundle = model_and_bundle()
    with kvcar.attach(model, bundle) as attachment:
        cache = KVCarCache(bundle, attend_pages=2)
        prefill(model, cache, ids(5 * PAGE))
        attachment.capture_steps(capture)
        steps(model, cache, ids(1))
        arenas = [ref(arena) for arena in cache.arenas]
        del cache
        gc.collect()
        assert [arena() for arena in arenas] == [None]


def test_memory_of_kinds_of_steps_is_given_up(capture, plainly, monkeypatch):
    monkeypatch.setattr(graph_steps, "_MOST_KINDS", 1)
    model, bundle = model_and_bundle()
    following = ids(2, seed=5)

    def turns():
        caches = [KVCarCache(bundle), KVCarCache(bundle)]
        for batch, cache in enumerate(caches, 1):
            prefill(model, cache, ids(70, batch=batch))
        order = [0, 1, 0]
        return [steps(model, caches[i], following.expand(i + 1, -1)) for i in order]

    with kvcar.attach(model, bundle) as attachment:
        expected = plainly(turns)
        attachment.capture_steps(capture)
        for got, wanted in zip(turns(), expected, strict=True):
            same(got, wanted)
    assert DEVICE != "cpu" or capture.captures == 3


def autoencoder(model):
    return fitted(model, codec="autoencoder", times_smaller=3, steps=5), {}, {}


def one_layer_exact(model):
    return by_hand(model, [tuple(Slot(0, head, kind) for head in (0, 1)) for kind in ("key", "value")]), {}, {}


def some_pages_without_a_window(model):
    return fitted(model, times_smaller=3), {"attend_pages": 1, "window": 0}, {}


def tokens_coded_at_once(model):
    return fitted(model, times_smaller=3), {"window": 0}, {}


def hidden_states(model):
    return fitted(model, times_smaller=3), {}, {"output_hidden_states": True}


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (autoencoder, "not affine"),
        (one_layer_exact, "some layers are not coded"),
        (some_pages_without_a_window, "without a window"),
        (tokens_coded_at_once, "would round them first"),
        (hidden_states, "asked for output_hidden_states"),
    ],
)
def test_what_is_not_captured_runs_as_ever_and_is_told(capture, caplog, case, reason):
    model = tiny_model("llama", num_hidden_layers=2).to(DEVICE)
    bundle, options, asked = case(model)
    prompt, following = ids(5 * PAGE), ids(2, seed=5)
    with kvcar.attach(model, bundle) as attachment:
        other, cache = KVCarCache(bundle, **options), KVCarCache(bundle, **options)
        prefill(model, other, prompt)
        prefill(model, cache, prompt)
        expected = steps(model, other, following)
        attachment.capture_steps(capture)
        with caplog.at_level(logging.WARNING, "kvcar.graphs"):
            same(steps(model, cache, following, **asked), expected)
    check_same_contents(cache, other)
    assert [reason in record.message for record in caplog.records] == [True]
    assert DEVICE != "cpu" or capture.replays == 0


def test_passes_in_other_modes_are_not_captured(capture, caplog):
    model, bundle = model_and_bundle()
    with kvcar.attach(model, bundle) as attachment, caplog.at_level(logging.WARNING, "kvcar.graphs"):
        cache = KVCarCache(bundle)
        prefill(model, cache, ids(2 * PAGE))
        attachment.capture_steps(capture)
        model(ids(1), past_key_values=cache, use_cache=True)
        with torch.autocast(DEVICE, torch.bfloat16):
            steps(model, cache, ids(1))
        model.train()
        steps(model, cache, ids(1))
    assert cache.tokens == 2 * PAGE + 3
    told = [record.message for record in caplog.records]
    assert all(reason in line for reason, line in zip(["gradients", "autocast", "training"], told, strict=True))
    assert DEVICE != "cpu" or capture.captures == 0


def test_the_model_is_left_as_it_was(capture):
    model, bundle = model_and_bundle()
    attachment = kvcar.attach(model, bundle)
    attachment.capture_steps(capture)
    assert "forward" in vars(model)
    attachment.detach()
    assert "forward" not in vars(model)
    assert attachment_of(model) is None


@pytest.mark.skipif(DEVICE != "cpu", reason="says what happens without CUDA")
def test_cuda_graphs_need_cuda():
    model, bundle = model_and_bundle()
    with pytest.raises(InputError, match="on cpu; leave cuda_graphs off"):
        kvcar.attach(model, bundle, cuda_graphs=True)
    assert attachment_of(model) is None
    assert not model.model._forward_hooks
    assert model.config._attn_implementation == "sdpa"


def test_tables_have_room_for_a_fourth_more_at_most():
    rooms = [table_pages(pages) for pages in range(5000)]
    assert rooms == sorted(rooms)
    assert all(pages <= room <= max(8, pages * 1.25) for pages, room in enumerate(rooms))
    assert len(set(rooms)) < 45
