"""Stepped log-likelihoods: texts that share rows score what each scores alone."""

import pytest
import torch
from bundles import fitted
from tiny import tiny_model
from transformers import DynamicCache

from kvcar.cache.attach import attach
from kvcar.cache.cache import KVCarCache
from kvcar.evaluate.scoring import Scorer, alike_together


def texts(seed=0):
    """Contexts of several lengths, most with two continuations, two that part within the context."""
    generator = torch.Generator().manual_seed(seed)

    def some(count):
        return torch.randint(1, 100, (count,), generator=generator).tolist()

    found = []
    for context in (some(70), some(9), some(23)):
        found += [(context, some(4)), (context, some(11))]
    stem = some(8)
    tail = some(5)
    return [*found, ([*stem, 101], tail), ([*stem, 102, 103], tail), (some(1), some(1))]


def test_rows_that_are_shared_change_nothing_of_the_full_cache():
    model = tiny_model("llama")
    given = texts()
    for step_tokens in (1, 7, 1000):
        for (context, continuation), found in zip(
            given, Scorer(model, lambda: DynamicCache(config=model.config), step_tokens).score(given), strict=True
        ):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([[*context, *continuation]]), use_cache=False).logits[0]
            scored = logits[len(context) - 1 : -1].log_softmax(-1)
            wanted = torch.tensor(continuation)
            assert found.log_likelihood == pytest.approx(float(scored.gather(1, wanted[:, None]).sum()), abs=1e-3)
            assert found.greedy == bool((scored.argmax(-1) == wanted).all())


@pytest.mark.parametrize("step_tokens", [1, 3])
def test_rows_that_are_shared_change_nothing_of_a_compressed_cache(step_tokens):
    # In float32 another order of sums flips codes of 3 bits now and then, which moves what follows by tenths.
    model = tiny_model("llama").double()
    bundle = fitted(model, bits=3)
    given = texts(1)
    full = Scorer(model, lambda: DynamicCache(config=model.config), step_tokens).score(given)
    with attach(model, bundle, 0):
        together = Scorer(model, lambda: KVCarCache(bundle, 0, keep_decoded=True), step_tokens)
        # Nothing kept: this reads its pages anew at every step.
        alone = Scorer(model, lambda: KVCarCache(bundle, 0), step_tokens)
        found = together.score(given)
        for text, each in zip(given, found, strict=True):
            assert each.log_likelihood == pytest.approx(alone.score([text])[0].log_likelihood, abs=1e-3)
    # What sharing could do is far below what reading the codes does.
    assert max(abs(a.log_likelihood - b.log_likelihood) for a, b in zip(full, found, strict=True)) > 1


def test_a_greedy_continuation_is_seen():
    model = tiny_model("llama")
    context = [5, 6, 7]
    with torch.no_grad():
        best = int(model(input_ids=torch.tensor([context])).logits[0, -1].argmax())
    scorer = Scorer(model, lambda: DynamicCache(config=model.config), 1)
    assert [s.greedy for s in scorer.score([(context, [best]), (context, [(best + 1) % 100])])] == [True, False]


def test_the_order_keeps_alike_texts_together_and_longer_ones_first():
    given = [([1, 2, 3, 4], [5]), ([1, 2, 3, 4], [6, 7]), ([8] * 20, [9]), ([8] * 20, [10])]
    assert alike_together(given) == [2, 3, 0, 1]
    assert sorted(alike_together(texts())) == list(range(len(texts())))
