"""Recall: what is asked lies far back, and answers are scored as stepping the caches by hand would score them."""

import math

import pytest
import torch
from bundles import fitted
from tiny import FAMILIES, tiny_model, token_ids
from tiny_families import tiny_family
from transformers import DynamicCache

import kvcar
from kvcar.cache.cache import KVCarCache
from kvcar.errors import InputError
from kvcar.evaluate.recall import Recall, RecallItem, evaluate_recall, measure_recall, recall_figures
from kvcar.evaluate.recall_items import SHARES, TASKS, Passage, Question, longest_passage, recall_passages


class Letters:
    """A tokenizer of a token for each letter, whose capitals are words after a blank."""

    bos_token_id = 1
    all_special_ids = (0, 1, 2)
    chat_template = None

    def __call__(self, text, add_special_tokens=True, **options):
        ids = [3 + ord(letter) % 125 for letter in text]
        return {"input_ids": [1, *ids] if add_special_tokens else ids}

    def __len__(self):
        return 128

    def decode(self, ids):
        return "".join(chr(i - 3) for i in ids if i > 2)


class Talking(Letters):
    """The same with a template, as models of conversations have one."""

    chat_template = "a template"

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        text = "".join(f"[{m['role']}] {m['content']} ." for m in messages)
        return text + ("[assistant] " if add_generation_prompt else "")


def passages_of(task, tokenizer=None, **options):
    given = {"items": 40, "exact_tokens": 96, "longest": 1500} | options
    return recall_passages(tokenizer or Letters(), tasks=[task], **given)


def place_of(part, ids):
    """Where ``part`` stands last in ``ids``."""
    found = [i for i in range(len(ids) - len(part) + 1) if ids[i : i + len(part)] == part]
    assert found, "what is asked for stands in the passage"
    return found[-1]


@pytest.mark.parametrize("task", list(TASKS))
@pytest.mark.parametrize("longest", [300, 1500])
def test_answers_stand_in_the_passage_further_back_than_anything_is_exact(task, longest):
    passages = passages_of(task, longest=longest)
    assert sum(len(p.questions) for p in passages) >= max(1, round(40 * SHARES.get(task, 1)))
    for passage in passages:
        assert passage.task == task
        assert passage.ids[0] == 1, "begins with the BOS token"
        assert len(passage.ids) < longest + 96
        for question in passage.questions:
            assert len(question.ids) + len(question.answer) <= 96
            at = place_of(question.answer, passage.ids)
            assert 4 <= at <= len(passage.ids) - len(question.answer) - 96


@pytest.mark.parametrize("task", ["pairs", "passkey", "needles", "repeated"])
def test_the_cue_stands_before_the_answer_and_nowhere_else(task):
    for passage in passages_of(task):
        for question in passage.questions:
            cued = question.ids + question.answer
            at = place_of(cued, passage.ids)
            assert place_of(question.ids, passage.ids) == at


def test_copies_are_so_far_back_as_they_say_near_and_far():
    passages = passages_of("copy", items=72, together=24)
    assert [len(p.ids) // 4 for p in passages] == [128, 256, 128]
    for passage in passages:
        for question in passage.questions:
            at = len(passage.ids) - question.size
            assert passage.ids[at : at + len(question.answer)] == question.answer
            assert passage.ids[at - 12 : at] == question.ids[-12:], "six words and commas"
        sizes = [q.size for q in passage.questions]
        assert 256 <= min(sizes) < 260
        assert max(sizes) > 0.9 * len(passage.ids)


def test_pairs_are_as_many_as_they_say_and_runs_repeat():
    sizes = {q.size for p in passages_of("pairs", items=100, longest=4000) for q in p.questions}
    assert sizes == {20, 50, 80, 110, 125}, "as many as there are words"
    for passage in passages_of("repeated"):
        run = passage.ids[-passage.questions[0].size :]
        assert any(run == (run[:period] * len(run))[: len(run)] for period in range(1, 16))


@pytest.mark.parametrize("tokenizer", [Letters(), Talking()])
def test_a_conversation_goes_on_where_it_was_stored(tokenizer):
    for passage in passages_of("turns", tokenizer):
        assert passage.stored
        for question in passage.questions:
            said = tokenizer.decode(passage.ids + question.ids)
            assert said.count("[user]" if tokenizer.chat_template else "User:") >= 3
            assert said.endswith("is")
            assert "What is the code of my" in tokenizer.decode(question.ids)


def test_a_seed_gives_the_same_items_and_another_others():
    assert passages_of("pairs") == passages_of("pairs")
    assert passages_of("pairs") != passages_of("pairs", seed=1)


def test_what_cannot_be_asked_is_refused():
    for options, message in (
        ({"items": 0}, "at least 1 item"),
        ({"tasks": ["sums"]}, "unknown recall task 'sums'; known are: copy"),
        ({"longest": 200}, "are too short for recall: 128 recent tokens may be exact, so 272 are needed"),
    ):
        with pytest.raises(InputError, match=message):
            recall_passages(Letters(), **options)
    assert longest_passage(8192) == 6144
    assert longest_passage(512) < 512
    with pytest.raises(InputError, match="the model has 512 positions"):
        longest_passage(512, 500)
    model = tiny_model("llama")
    with pytest.raises(InputError, match="a tokenizer is what"):
        evaluate_recall(model, fitted(model, bits=3), "letters")


@torch.no_grad()
def continued(model, cache, ids, tokens=4):
    """What a model writes after ``ids`` over ``cache``, greedily, and the log-probabilities ``[tokens, V]``."""
    written, found = [], []
    for _ in range(tokens):
        logits = model(input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=True).logits[0, -1]
        found.append(torch.log_softmax(logits, -1))
        ids = [int(logits.argmax())]
        written += ids
    return tuple(written), torch.stack(found)


def own_passages(model, count=6, tokens=150, stored=False):
    """Passages whose answers are what the full cache says; the last question of each has another."""
    passages = []
    for seed in range(count):
        ids = token_ids(tokens, seed=seed)[0].tolist()
        questions = []
        for cue in token_ids(3, batch=5, seed=100 + seed).tolist():
            cache = DynamicCache(config=model.config)
            with torch.no_grad():
                model(input_ids=torch.tensor([ids]), past_key_values=cache)
            questions.append(Question(tuple(cue), continued(model, cache, cue)[0], 1))
        wrong = Question((5, 6), tuple((a + 1) % 128 for a in questions[-1].answer), 1)
        passages.append(Passage("own", tuple(ids), (*questions, wrong), stored))
    return passages


@pytest.mark.parametrize("stored", [False, True])
def test_scores_are_those_of_stepping_by_hand(stored):
    model = tiny_model("llama")
    bundle, passages = fitted(model, bits=1, layers_per_block=2), own_passages(model, stored=stored)
    right, divergences = [], []
    with kvcar.attach(model, bundle) as attached:
        found = measure_recall(model, passages, {"ours": attached.new_cache})["ours"]
        for passage in passages:
            for question in passage.questions[:-1]:
                cache, full = attached.new_cache(), DynamicCache(config=model.config)
                for each in (cache, full):
                    with torch.no_grad():
                        model(input_ids=torch.tensor([passage.ids]), past_key_values=each)
                if stored:
                    cache.flush_window()
                forced = [*question.ids, *question.answer[:-1]]
                with torch.no_grad():
                    p, q = (
                        torch.log_softmax(model(input_ids=torch.tensor([forced]), past_key_values=c).logits[0, -4:], -1)
                        for c in (full, cache)
                    )
                divergences.append(float((p.exp() * (p - q)).sum(-1).mean()))
                right.append(tuple(q.argmax(-1).tolist()) == question.answer)
    assert len(found.items) == 36
    assert len(found.counted) == 30, "the answer that the full cache does not give is left out"
    assert found.full_exact_match == pytest.approx(30 / 36)
    assert found.exact_match.value == pytest.approx(sum(right) / len(right))
    assert found.exact_match.value < 0.95, "one bit loses some"
    assert found.points_lost.value == pytest.approx(100 - 100 * found.exact_match.value)
    assert found.kl_divergence.value == pytest.approx(sum(divergences) / len(divergences), rel=1e-3)


def test_right_is_what_greedy_generation_writes():
    model = tiny_model("llama")
    bundle, passages = fitted(model, bits=1), own_passages(model, count=3)
    with kvcar.attach(model, bundle) as attached:
        found = iter(measure_recall(model, passages, {"ours": attached.new_cache})["ours"].counted)
        for passage in passages:
            cache = attached.new_cache()
            with torch.no_grad():
                model(input_ids=torch.tensor([passage.ids]), past_key_values=cache)
            for question in passage.questions[:-1]:
                written, _ = continued(model, cache.fork(), list(question.ids))
                assert next(found).right == (written == question.answer)


def test_finer_codes_lose_less_and_lossless_ones_nothing():
    model = tiny_model("llama")
    passages = own_passages(model)
    lost = {}
    for name, options in {"1 bit": {"bits": 1}, "4 bits": {"bits": 4}, "lossless": {"codec": "identity"}}.items():
        with kvcar.attach(model, fitted(model, **options)) as attached:
            lost[name] = measure_recall(model, passages, {"x": attached.new_cache})["x"]
    assert lost["1 bit"].points_lost.value > lost["4 bits"].points_lost.value
    assert lost["1 bit"].kl_divergence.value > 3 * lost["4 bits"].kl_divergence.value
    assert lost["lossless"].points_lost.value == 0
    assert lost["lossless"].kl_divergence.value < 1e-5


def test_questions_that_are_asked_together_are_answered_as_they_are_alone():
    model = tiny_model("llama")
    passages = own_passages(model, count=2)
    with kvcar.attach(model, fitted(model, bits=2)) as attached:
        together, alone = (
            measure_recall(model, passages, {"x": attached.new_cache}, together=n)["x"].items for n in (8, 1)
        )
    assert [i.right for i in together] == [i.right for i in alone]
    assert [i.kl_divergence for i in together] == pytest.approx([i.kl_divergence for i in alone], rel=1e-3, abs=1e-6)


def test_a_cache_is_read_once_and_not_changed_by_questions():
    model = tiny_model("llama")
    bundle = fitted(model, bits=2)
    made = []

    def make():
        made.append(KVCarCache(bundle))
        return made[-1]

    with kvcar.attach(model, bundle):
        measure_recall(model, own_passages(model, count=2), {"x": make})
    assert [cache.tokens for cache in made] == [150, 150]


def item(passage, right, full_right=True, kl=0.5, lead=2.0):
    return RecallItem("t", 1, passage, full_right, right, kl, lead)


def test_what_the_full_cache_is_sure_of_is_counted_apart():
    model = tiny_model("llama")
    passages = own_passages(model, count=1)
    found = measure_recall(model, passages, {"full": lambda: DynamicCache(config=model.config)})["full"]
    question, cache = passages[0].questions[0], DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=torch.tensor([passages[0].ids]), past_key_values=cache)
    _, log_probabilities = continued(model, cache, list(question.ids))
    two = log_probabilities.topk(2).values
    assert found.items[0].lead < 0, "the shortest question, whose answer the full cache does not give"
    assert found.items[1].lead == pytest.approx(float((two[:, 0] - two[:, 1]).min()), abs=1e-4)
    recall = Recall((item(0, True), item(1, False, lead=0.9), item(2, False), item(3, True, False, lead=-1)))
    assert [each.passage for each in recall.sure.items] == [0, 2]
    figures = recall_figures(recall)
    assert (figures["sure"], figures["sure_points_lost"]) == (2, 50)


def test_standard_errors_take_passages_not_items_as_independent():
    alike = Recall(tuple(item(p, p < 2) for p in range(4) for _ in range(10)))
    assert alike.exact_match.value == 0.5
    # Four passages that are all right or all wrong: the standard error of four throws.
    assert alike.exact_match.stderr == pytest.approx(math.sqrt(4 / 3 * 4 * 25) / 40)
    assert math.isnan(Recall((item(0, True),)).exact_match.stderr)


def test_figures_count_what_is_left_out_and_what_is_gained():
    recall = Recall((item(0, True), item(1, False), item(2, True, full_right=False, kl=9), item(3, False, False)))
    figures = recall_figures(recall)
    assert (figures["asked"], figures["counted"], figures["gained"]) == (4, 2, 1)
    assert figures["exact_match"] == 0.5
    assert figures["kl_divergence"] == 0.5
    assert figures["tasks"]["t"]["points_lost"] == 50
    assert len(figures["items"]) == 4
    nothing = Recall((item(0, False, full_right=False),))
    assert math.isnan(nothing.exact_match.value)
    assert math.isnan(nothing.kl_divergence.value)


def test_by_bundle_as_by_hand():
    model, tokenizer = tiny_model("llama"), Letters()
    bundle = fitted(model, bits=2)
    found = kvcar.evaluate_recall(model, bundle, tokenizer, items=4, tasks=["copy", "turns"], longest=300)
    passages = recall_passages(tokenizer, 4, exact_tokens=64, longest=300, tasks=["copy", "turns"])
    with kvcar.attach(model, bundle) as attached:
        assert measure_recall(model, passages, {"x": attached.new_cache})["x"] == found
        assert kvcar.evaluate_recall(model, bundle, tokenizer, items=4, tasks=["copy", "turns"], longest=300) == found
    assert set(found.tasks) == {"copy", "turns"}
    assert "on 0 items" in repr(found)


@pytest.mark.parametrize("family", ["gpt2", "gemma3", "lfm2", "falcon_h1"])
def test_models_of_other_kinds_lose_nothing_in_a_lossless_cache(family):
    model = tiny_model(family) if family in FAMILIES else tiny_family(family)
    with kvcar.attach(model, kvcar.lossless(model, window=0)) as attached:
        found = measure_recall(model, own_passages(model, count=2), {"x": attached.new_cache})["x"]
    assert len(found.counted) == 10
    assert found.points_lost.value == 0
    assert found.kl_divergence.value < 1e-5
