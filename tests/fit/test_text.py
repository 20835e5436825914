"""Texts and windows of tokens from them."""

import json
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_model

import kvcar
from kvcar.errors import InputError
from kvcar.fit.openings import CHAT, OPENINGS
from kvcar.fit.samples import sample_windows
from kvcar.text import EMBEDDED_NAME, TextSource, given_texts, read_text, split_text, token_windows


class LetterTokenizer:
    """One token a letter; adds BOS by default or not."""

    bos_token_id = 1

    def __init__(self, bos=False):
        self.bos = bos

    def __call__(self, text, add_special_tokens=True, verbose=True):
        return {"input_ids": ([1] if self.bos and add_special_tokens else []) + [ord(c) % 100 + 5 for c in text]}


def test_the_embedded_text_is_long_english():
    source = read_text(None)
    assert source.name == EMBEDDED_NAME
    assert len(source.text) > 300_000
    assert " the " in source.text
    assert read_text(None).sha256 == source.sha256


def test_files(tmp_path):
    (tmp_path / "a.txt").write_text("Grüße\n\nworld", encoding="utf-8")
    assert read_text(tmp_path / "a.txt").text == "Grüße\n\nworld"
    lines = [json.dumps({"text": "one", "id": 3}), "", json.dumps({"text": "two\nlines"})]
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    assert read_text(tmp_path / "b.jsonl").text == "one\n\ntwo\nlines"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "No such file"),
        ("empty.txt", b" \n", "is empty"),
        ("latin.txt", b"caf\xe9", "not UTF-8"),
        ("page.html", b"<p>", r"give a \.txt"),
        ("bad.jsonl", b'{"text": "a"}\n{', "line 2 is not JSON"),
        ("field.jsonl", b'{"body": "a"}', "line 1 has no string field 'text'"),
        ("list.jsonl", b"[1]", "line 1 has no string field"),
        (
            "half.jsonl",
            b'{"text": "a"}\n{"text": "b\\ud800"}',
            r"line 2 has half a surrogate pair \(U\+D800, character 1\)",
        ),
        ("deep.jsonl", b'{"text": ' + b"[" * 100_000, "line 1 is nested too deep"),
        ("nul\0.txt", None, "embedded null byte"),
        ("wide.txt", "text".encode("utf-16"), "not UTF-8"),
    ],
)
def test_unusable_files_say_why(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_text(tmp_path / name)


def test_strings_hold_any_line_break_and_numbers_any_digits(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(
        '{"text": "one\u2028two\x85three\x0cfour"}\r\n{"n": -NUMBER, "text": "five"}\r{"text": "six"}'.replace(
            "NUMBER", "9" * 5000
        )
        .replace("\x0c", "\\f")
        .encode()
    )
    assert read_text(tmp_path / "a.jsonl").text == "one\u2028two\x85three\x0cfour\n\nfive\n\nsix"


@pytest.mark.parametrize("name", ["a.txt", "A.TXT", "a.jsonl", "a.JSONL"])
def test_a_byte_order_mark_is_no_text_and_capitals_do_not_matter(tmp_path, name):
    content = '{"text": "one"}\n' if name.lower().endswith("jsonl") else "one"
    (tmp_path / name).write_text(content, encoding="utf-8-sig")
    assert read_text(tmp_path / name).text == "one"
    assert [source.text for source in given_texts(str(tmp_path / name))] == ["one"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes of POSIX")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(InputError, match="not a regular file"):
        read_text(tmp_path / "a.txt")


def test_half_a_surrogate_pair_given_as_text():
    with pytest.raises(InputError, match="given text has half a surrogate pair"):
        given_texts("one \udfff two")


@pytest.mark.parametrize("unit", ["word ", "A sentence. ", "a line\n", "x"])
@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.5])
def test_a_blank_line_far_away_cuts_nothing_off(unit, fraction):
    text = "Title\n\n" + unit * 5000
    kept, rest = split_text(TextSource("a", text, ""), fraction)
    assert kept.text + rest.text == text
    assert fraction <= len(rest.text) / len(text) < 1.5 * fraction + 0.001
    assert kept.text.endswith(unit)


def test_a_text_is_cut_at_the_largest_end_that_is_near():
    text = "a. b\nc. d\n\ne. f\ng h" * 20
    assert split_text(TextSource("a", text, ""), 0.1)[0].text.endswith("\n\n")
    text = text.replace("\n\n", "\n")
    assert split_text(TextSource("a", text, ""), 0.1)[0].text.endswith("\n")
    text = text.replace("\n", " ")
    assert split_text(TextSource("a", text, ""), 0.1)[0].text.endswith(". ")


def test_splitting_keeps_every_letter_and_cuts_at_a_paragraph(tmp_path):
    source = read_text(None)
    kept, held = split_text(source, 0.1)
    assert kept.text + held.text == source.text
    assert kept.text.endswith("\n\n")
    assert 0.08 < len(held.text) / len(source.text) < 0.12
    with pytest.raises(InputError, match="between 0 and 1"):
        split_text(source, 1.0)


@given(st.integers(2, 40), st.integers(1, 8), st.integers(0, 400), st.booleans())
def test_windows_do_not_overlap_and_stay_in_order(context, windows, extra, bos):
    taken = context - bos
    text = "".join(chr(ord("a") + i % 26) for i in range(taken * windows + extra))
    tokenizer = LetterTokenizer(bos)
    ids = token_windows(tokenizer, text, context, windows)
    assert ids.shape == (windows, context)
    assert ids.dtype == torch.int64
    if bos:
        assert (ids[:, 0] == 1).all()
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    end = 0
    for row in ids[:, int(bos) :].tolist():
        start = next(i for i in range(end, len(whole) - taken + 1) if whole[i : i + taken] == row)
        assert start >= end
        end = start + taken


@pytest.mark.parametrize(
    ("context", "windows", "message"),
    [
        (101, 1, "context of at most 100"),
        (50, 3, "at most 2 windows"),
        (1, 1, "at least 2 tokens"),
        (10, 0, "at least 1 window"),
    ],
)
def test_texts_shorter_than_their_windows_say_what_would_fit(context, windows, message):
    with pytest.raises(InputError, match=message):
        token_windows(LetterTokenizer(), "x" * 100, context, windows)


class Letters:
    """A tokenizer of a character each, without a chat template."""

    bos_token_id = eos_token_id = None

    def __call__(self, text, **options):
        return {"input_ids": [3 + ord(letter) % 100 for letter in text]}


def test_samples_begin_with_openings_and_go_on_as_the_model_would():
    model = tiny_model("llama")
    drawn = sample_windows(model, Letters(), 3, 300, seed=1)
    assert drawn.shape == (3, 300)
    assert torch.equal(drawn, sample_windows(model, Letters(), 3, 300, seed=1))
    assert not torch.equal(drawn, sample_windows(model, Letters(), 3, 300, seed=2))
    passages = drawn.flatten().split(256)
    for passage, opening in zip(passages, OPENINGS, strict=False):
        given = torch.tensor(Letters()(opening.removeprefix(CHAT))["input_ids"])[: len(passage)]
        assert torch.equal(passage[: len(given)], given)
    # What follows is likelier under the model than other tokens are.
    whole = passages[0][None]
    with torch.no_grad():
        logits = model(whole).logits[0, :-1].log_softmax(-1)
    start = len(OPENINGS[0])
    likelihood = logits.gather(1, whole[0, 1:, None])[start:, 0].mean()
    assert likelihood > logits[start:].mean() + 0.5


def test_after_an_end_another_opening_follows():
    model = tiny_model("llama")
    everything = list(range(model.config.vocab_size))
    model.generation_config.eos_token_id = everything
    drawn = sample_windows(model, Letters(), 1, 256, seed=0)[0].tolist()
    second = Letters()(OPENINGS[7].removeprefix(CHAT))["input_ids"]
    place = len(OPENINGS[0]) + 1
    assert drawn[place : place + len(second)] == second


def test_a_searched_fit_reads_text_code_and_samples_and_says_how_it_does_on_each():
    model = tiny_model("llama")
    bundle = kvcar.fit(model, Letters(), times_smaller=4, tokens=8 * 512, effect_tokens=512)
    assert "samples of the model" in bundle.fit.text
    kinds = bundle.figures["kl_divergence_by_kind"]
    assert len(kinds) == 3
    assert all(kl > 0 for kl in kinds.values())
    alone = kvcar.fit(model, Letters(), times_smaller=4, tokens=8 * 512, effect_tokens=512, samples=False, check=False)
    assert "samples" not in alone.fit.text
