"""Passages with questions whose answers stand in them: what a cache must give back, generated for any tokenizer.

A passage is read once, and each of its questions is asked of a copy of the cache. What is asked for lies further back than a cache
keeps tokens exactly, and not at the very beginning.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from ..errors import InputError
from ..registry import Registry
from ..text import default_bos, evaluation_texts

LONGEST_TOKENS = 6144
_LENGTHS = (512, 1024, 2048, 4096, 6144)
_PAIRS = (20, 50, 80, 110, 140)
_NEAREST_COPY = 256
_CUE, _COPIED = 6, 3  # words
_QUESTION_ROOM = 96  # no question with its answer is longer
_BEFORE = 24  # more than any cache keeps exactly at the beginning
_WORDS = 1500
_TOGETHER = 24
_DIGITS = 5
_PLACES = (
    "Lima", "Oslo", "Cairo", "Quito", "Delhi", "Paris", "Tokyo", "Dublin", "Prague", "Vienna", "Madrid", "Lisbon", "Warsaw",
    "Athens", "Nairobi", "Havana", "Seoul", "Tunis", "Riga", "Bern", "Rome", "Kiev", "Doha", "Accra",
)  # fmt: skip
_THINGS = (
    "locker", "garage", "bicycle", "suitcase", "office", "safe", "garden gate", "mailbox", "boat", "phone", "alarm", "cellar",
)  # fmt: skip
_RUNS = (256, 400, 640)
_SYMBOLS = (" okay", "ha", "0", " the", "\n", " na na", " one two three", "😀")


@dataclass(frozen=True)
class Question:
    """A question at the end of a passage.

    Attributes:
        ids: its tokens.
        answer: the tokens that follow it.
        size: how hard it is: tokens back to the answer, or pairs to choose from.
    """

    ids: tuple[int, ...]
    answer: tuple[int, ...]
    size: int


@dataclass(frozen=True)
class Passage:
    """Tokens to read, and questions about them, each of which is asked right after the passage.

    Attributes:
        task: the name of its task.
        ids: its tokens.
        questions: at least one.
        stored: whether the cache is saved to a file and loaded before the questions.
    """

    task: str
    ids: tuple[int, ...]
    questions: tuple[Question, ...]
    stored: bool = False


@dataclass(frozen=True)
class Fact:
    """A cue, the number that follows it, and what ends it, as tokens."""

    cue: tuple[int, ...]
    number: tuple[int, ...]
    end: tuple[int, ...] = ()

    @property
    def ids(self) -> tuple[int, ...]:
        """All of its tokens."""
        return (*self.cue, *self.number, *self.end)

    def question(self, size: int) -> Question:
        """Ask for its number."""
        return Question(self.cue, self.number, size)


class Writer:
    """What tasks are written with: random words, digits and English text as tokens of one tokenizer.

    Args:
        tokenizer: the model's.
        seed: of everything random.
        exact_tokens: recent tokens that a cache may keep exactly.
        longest: tokens of the longest passage.
        questions: of a passage at most.
    """

    def __init__(self, tokenizer: Any, seed: int, exact_tokens: int, longest: int, questions: int) -> None:
        self.draw, self.questions = random.Random(seed), questions
        self.exact_tokens, self.longest = exact_tokens, longest
        self.tokenizer = tokenizer
        self.words = _plain_words(tokenizer)
        self.start = default_bos(tokenizer)
        self._filler = self.encode(evaluation_texts(None)[0].text)

    def encode(self, text: str) -> list[int]:
        """Tokens of a piece of text; pieces are joined as tokens, so that a piece is the same tokens wherever it stands."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def number(self) -> list[int]:
        """Tokens of a random number after a blank."""
        return self.encode(f" {self.draw.randrange(10 ** (_DIGITS - 1), 10**_DIGITS)}")

    def filler(self, tokens: int) -> list[int]:
        """English text of so many tokens, from a random place."""
        repeated = self._filler * (1 + tokens // len(self._filler))
        first = self.draw.randrange(len(repeated) - tokens + 1)
        return repeated[first : first + tokens]

    def beginning(self) -> list[int]:
        """How a passage begins: tokens that nobody asks for."""
        return [*self.start, *self.filler(_BEFORE)]

    def end(self) -> list[int]:
        """How a passage ends: as many tokens as may be kept exactly."""
        return self.filler(self.exact_tokens)

    def lengths(self, least: int = 0) -> list[int]:
        """Lengths of passages, as far as they are allowed; at least one."""
        least = max(least, least_tokens(self.exact_tokens))
        return [n for n in _LENGTHS if least <= n <= self.longest] or [self.longest]

    def facts(self, cues: Iterable[list[int]], room: int, end: str = "") -> list[Fact]:
        """Cues with a number each, as many as ``room`` tokens hold, at least one."""
        found, stop = [], self.encode(end)
        for cue in cues:
            fact = Fact(tuple(cue), tuple(self.number()), tuple(stop))
            room -= len(fact.ids)
            if found and room < 0:
                break
            found.append(fact)
        return found

    def spread(self, facts: Sequence[Sequence[int]], tokens: int) -> list[int]:
        """A passage of ``tokens`` in which facts stand at random places in English text."""
        free = max(0, tokens - sum(map(len, facts)) - _BEFORE - self.exact_tokens)
        cuts = sorted(self.draw.randrange(free + 1) for _ in facts)
        text, ids, last = self.filler(free), self.beginning(), 0
        for cut, fact in zip(cuts, facts, strict=True):
            ids += [*text[last:cut], *fact]
            last = cut
        return [*ids, *text[last:], *self.end()]


TASKS: Registry[Callable[[Writer], Iterator[Passage]]] = Registry("recall task")
"""Name -> writes passages without end."""

STORED_TASK = "turns"
"""The one whose cache is saved and loaded."""

SHARES = {"passkey": 0.125}
"""Items of a task over those of others: a pass key takes a passage of its own."""


def recall_passages(
    tokenizer: Any,
    items: int = 60,
    *,
    seed: int = 0,
    exact_tokens: int = 128,
    longest: int = LONGEST_TOKENS,
    tasks: Sequence[str] | None = None,
    together: int | None = None,
) -> list[Passage]:
    """Write passages with at least ``items`` questions for each task (an eighth of them for the task with one to a passage).

    Args:
        tokenizer: the model's.
        items: questions of each task.
        seed: of everything random.
        exact_tokens: recent tokens that a cache may keep exactly; what is asked for lies further back.
        longest: tokens of the longest passage.
        tasks: names of ``TASKS``; all by default.
        together: questions about a passage at most; by default so many that passages of all sizes are written.

    Raises:
        InputError: an unknown task, no items, or passages that must be too short for anything to lie far enough back.
    """
    check_items(items, exact_tokens, longest, tasks)
    writers = {name: TASKS[name] for name in tasks or TASKS}
    together = together or min(_TOGETHER, -(-items // len(_LENGTHS)))
    passages = []
    for index, (name, write) in enumerate(writers.items()):
        wanted = max(1, round(items * SHARES.get(name, 1)))
        for passage in write(Writer(tokenizer, seed * 1000 + index, exact_tokens, longest, together)):
            passages.append(passage)
            wanted -= len(passage.questions)
            if wanted <= 0:
                break
    return passages


def check_items(items: int, exact_tokens: int, longest: int, tasks: Sequence[str] | None) -> None:
    """Refuse what ``recall_passages`` cannot write; raises InputError."""
    if items < 1:
        raise InputError(f"recall needs at least 1 item of each task, got {items}")
    for name in tasks or ():
        _ = TASKS[name]
    least = least_tokens(exact_tokens)
    if longest < least:
        raise InputError(
            f"passages of {longest} tokens are too short for recall: {exact_tokens} recent tokens may be exact, so {least} are "
            "needed; give more, or a smaller window"
        )


def least_tokens(exact_tokens: int) -> int:
    """Tokens of the shortest passage in which something lies further back than ``exact_tokens``."""
    return exact_tokens + 2 * _BEFORE + _QUESTION_ROOM


def longest_passage(positions: int, asked: int | None = None) -> int:
    """Tokens of the longest passage that leaves room for a question: as asked, or 6,144; raises InputError where it does not fit."""
    room = positions - 2 * _QUESTION_ROOM  # text that is cut and joined may be a few tokens longer
    if asked is not None and not 0 < asked <= room:
        raise InputError(f"passages may have 1 to {room} tokens, as the model has {positions} positions; got {asked}")
    return min(LONGEST_TOKENS, room) if asked is None else asked


@TASKS.register("copy")
def _copy(w: Writer) -> Iterator[Passage]:
    """Random words, 256 to 6,000 tokens back: a few of them again, and the next three are the answer."""
    comma, head = w.encode(","), w.encode("\nWords:")
    period = 1 + len(comma)
    while True:
        for length in w.lengths():
            ids = [*w.start, *head]
            first = len(ids)
            while len(ids) < length:
                ids += [w.draw.choice(w.words), *comma]
            nearest, furthest = (
                max(_NEAREST_COPY, w.exact_tokens + 3 * period),
                length - first - _BEFORE - _CUE * period,
            )
            questions = []
            for place in range(w.questions):
                # Evenly in the logarithm, so that near and far are asked alike.
                back = round(min(nearest, furthest) * (max(1, furthest / nearest)) ** (place / max(1, w.questions - 1)))
                at = first + (len(ids) - back - first) // period * period
                cue, answer = ids[at - _CUE * period : at], ids[at : at + _COPIED * period - len(comma)]
                questions.append(Question((*head, *cue), tuple(answer), len(ids) - at))
            yield Passage("copy", tuple(ids), _distinct(questions))


@TASKS.register("pairs")
def _pairs(w: Writer) -> Iterator[Passage]:
    """20 to 140 words with a number each; asked for the number of a word."""
    while True:
        for count in _PAIRS:
            facts = _words_with_numbers(w, count, w.longest - 2 * _BEFORE - w.exact_tokens)
            asked = w.draw.sample(facts, min(w.questions, len(facts)))
            ids = [*w.beginning(), *_joined(facts), *w.encode("\n"), *w.end()]
            yield Passage("pairs", tuple(ids), tuple(fact.question(len(facts)) for fact in asked))


@TASKS.register("passkey")
def _passkey(w: Writer) -> Iterator[Passage]:
    """A pass key somewhere in English text."""
    while True:
        for length in w.lengths()[:3]:
            (fact,) = w.facts([w.encode("\nThe pass key is")], length, ".")
            twice = [*fact.ids, *w.encode(" Remember it."), *fact.ids, *w.encode("\n")]
            yield Passage("passkey", tuple(w.spread([twice], length)), (fact.question(length),))


@TASKS.register("needles")
def _needles(w: Writer) -> Iterator[Passage]:
    """Sixteen sentences of one form in English text; asked for one of them, the others distract."""
    while True:
        for length in w.lengths(least=1024)[:3]:
            cues = (w.encode(f"\nThe secret code of {place} is") for place in w.draw.sample(_PLACES, 16))
            facts = w.facts(cues, length - 2 * _BEFORE - w.exact_tokens, ".\n")
            ids = w.spread([fact.ids for fact in facts], length)
            asked = w.draw.sample(facts, min(w.questions, len(facts)))
            yield Passage("needles", tuple(ids), tuple(fact.question(length) for fact in asked))


@TASKS.register("repeated")
def _repeated(w: Writer) -> Iterator[Passage]:
    """Words with a number each, and then one token, or a few, repeated some hundred times."""
    while True:
        for symbol in _SYMBOLS:
            facts = _words_with_numbers(w, max(8, w.questions), w.longest - 2 * _BEFORE - w.exact_tokens)
            ids, pattern = [*w.beginning(), *_joined(facts), *w.encode("\n")], w.encode(symbol)
            run = max(min(w.draw.choice(_RUNS), w.longest - len(ids)), w.exact_tokens)
            repeated = (pattern * run)[:run]
            asked = w.draw.sample(facts, min(w.questions, len(facts)))
            yield Passage("repeated", (*ids, *repeated), tuple(fact.question(run) for fact in asked))


def _words_with_numbers(w: Writer, count: int, room: int) -> list[Fact]:
    """Lines of a word, a colon and a number."""
    words = w.draw.sample(w.words, min(count, len(w.words)))
    return w.facts(([*w.encode("\n"), word, *w.encode(":")] for word in words), room)


def _joined(facts: Sequence[Fact]) -> list[int]:
    return [each for fact in facts for each in fact.ids]


@TASKS.register(STORED_TASK)
def _turns(w: Writer) -> Iterator[Passage]:
    """A conversation whose cache was saved and loaded; asked in its next turn for what was said in an earlier one."""
    while True:
        for length in w.lengths()[:3]:
            things = w.draw.sample(_THINGS, min(len(_THINGS), max(1, length // 128)))
            codes = {thing: f"{w.draw.randrange(10 ** (_DIGITS - 1), 10**_DIGITS)}" for thing in things}
            passage = _conversation(w, codes, length)
            while len(passage.ids) > w.longest + _DIGITS and len(codes) > 1:
                codes.popitem()  # a tokenizer of letters
                passage = _conversation(w, codes, length)
            yield passage


def _conversation(w: Writer, codes: dict[str, str], tokens: int) -> Passage:
    say = _speaker(w.tokenizer)
    overhead = len(w.encode(say(_facts(codes, [""] * len(codes))))) + w.exact_tokens
    each = max(4, (tokens - overhead) // len(codes))
    texts = [w.tokenizer.decode(w.filler(each)) for _ in codes]
    last = ("user", "Thank you. Here is something else: " + w.tokenizer.decode(w.filler(w.exact_tokens)))
    turns = [*_facts(codes, texts), last, ("assistant", "I have read it.")]
    context = say(turns)
    ids, questions = w.encode(context), []
    if ids[: len(w.start)] != w.start:  # a template may write it
        ids = [*w.start, *ids]
    for thing, code in codes.items():
        whole = say([*turns, ("user", f"What is the code of my {thing}?")], ask=True)
        asked = w.encode(whole.removeprefix(context) + f"The code of your {thing} is")
        questions.append(Question(tuple(asked), tuple(w.encode(f" {code}")), tokens))
    return Passage(STORED_TASK, tuple(ids), tuple(questions), stored=True)


def _facts(codes: dict[str, str], texts: Sequence[str]) -> list[tuple[str, str]]:
    turns = []
    for (thing, code), text in zip(codes.items(), texts, strict=True):
        turns.append(("user", f"The code of my {thing} is {code}. {text}"))
        turns.append(("assistant", f"The code of your {thing} is {code}."))
    return turns


def _speaker(tokenizer: Any) -> Callable[..., str]:
    """How turns are written: by the model's template, where a conversation begins as it did before its next turn."""

    def plain(turns: Sequence[tuple[str, str]], ask: bool = False) -> str:
        return "".join(f"{role.capitalize()}: {text}\n" for role, text in turns) + ("Assistant: " if ask else "")

    def template(turns: Sequence[tuple[str, str]], ask: bool = False) -> str:
        messages = [{"role": role, "content": text} for role, text in turns]
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)

    if not getattr(tokenizer, "chat_template", None):
        return plain
    one = [("user", "Hello."), ("assistant", "Hello.")]
    begins = template([*one, ("user", "And?")], ask=True).startswith(template(one))
    return template if begins else plain


def _plain_words(tokenizer: Any) -> list[int]:
    """Tokens that are one word, or all that are not special where there are few such words."""
    special = set(tokenizer.all_special_ids)
    known = [each for each in range(len(tokenizer)) if each not in special]
    for form in (r" [a-z]{3,}", r" ?[A-Za-z][a-z]{2,}"):
        # Vocabularies begin with what is frequent, which a small model knows better.
        found = (each for each in known if re.fullmatch(form, tokenizer.decode([each])))
        words = list(islice(found, _WORDS))
        if len(words) == _WORDS:
            return words
    return known


def _distinct(questions: Sequence[Question]) -> tuple[Question, ...]:
    """Each question once: in a short passage several distances are one."""
    return tuple({question.size: question for question in questions}.values())
