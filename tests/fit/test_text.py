"""Texts and windows of tokens from them."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvcar.errors import InputError
from kvcar.text import EMBEDDED_NAME, read_text, split_text, token_windows


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
    ],
)
def test_unusable_files_say_why(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_text(tmp_path / name)


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
