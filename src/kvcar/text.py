"""Text to fit and evaluate on: the embedded default, ``.txt`` and ``.jsonl`` files, and windows of tokens from them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import InputError, require
from .files import read_regular, reason_of

EMBEDDED_NAME = "pydoc_data.topics"
HELD_OUT_FRACTION = 0.1


@dataclass(frozen=True)
class TextSource:
    """A text and where it comes from.

    Attributes:
        name: file name, or the name of the embedded text.
        text: all of it.
        sha256: of the text in UTF-8, in hex.
    """

    name: str
    text: str
    sha256: str


def read_text(path: Path | str | None) -> TextSource:
    """Read a ``.txt`` file, a ``.jsonl`` file with a field ``text`` per line, or (None) the embedded text.

    Both are UTF-8, with or without a byte order mark. ``file.jsonl[:500]`` takes the first 500 documents, ``file.jsonl[500:]`` those after them.

    Raises:
        InputError: the file is missing, empty, not UTF-8, of another kind, or a line is not what it should be.
    """
    if path is None:
        return _source(EMBEDDED_NAME, _embedded())
    path, chosen = _split_slice(str(path))
    kind = path.suffix.lower()
    if chosen is not None and kind != ".jsonl":
        raise InputError(f"only .jsonl files have documents to choose from, not {path.name}")
    name = path.name if chosen is None else f"{path.name}[{_number(chosen.start)}:{_number(chosen.stop)}]"
    readers: dict[str, Callable[[Path, str], str]] = {
        ".txt": lambda _, text: text,
        ".jsonl": lambda path, text: _join_documents(path, text, chosen),
    }
    if kind not in readers:
        raise InputError(f"{path} is no text kvcar can read; give a .txt file, or a .jsonl file with a field 'text'")
    try:
        raw = read_regular(path)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the text {path}: {reason_of(error)}") from None
    try:
        text = readers[kind](path, raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}); convert it first") from None
    if not text.strip():
        raise InputError(f"{path} is empty; give it some text")
    return _source(name, text)


Texts = str | Path | Sequence[str | Path] | None
"""What the Python path takes: a text or the path of a file, several of them, or None for the embedded text."""


def given_texts(texts: Texts) -> list[TextSource]:
    """Read what was given from Python: a text itself, a path, or a list of these; None is the embedded text.

    A string is the path of a file where it is one line that ends in ``.txt`` or ``.jsonl`` (or a slice of one), in
    small letters or capitals, as ``read_text`` takes it, and a text otherwise.

    Raises:
        InputError: as ``read_text``; an empty list or an empty text.
    """
    if texts is None:
        return [read_text(None)]
    several = [texts] if isinstance(texts, str | Path) else texts
    if not isinstance(several, list | tuple) or not all(isinstance(each, str | Path) for each in several):
        raise InputError(f"a text is a string, a path, or a list of these, got {texts!r}")
    if not several:
        raise InputError("an empty list of texts was given; give a text, the path of a file, or leave it out")
    return [_given(each) for each in several]


def text_count(texts: Texts) -> int:
    """Count the texts that were given, the embedded one where none was."""
    return max(1, len(texts)) if isinstance(texts, list | tuple) else 1


def _given(text: str | Path) -> TextSource:
    if isinstance(text, Path) or re.fullmatch(r".+\.(txt|jsonl)(\[\d*:\d*\])?", text, re.IGNORECASE):
        return read_text(text)
    if not text.strip():
        raise InputError("an empty text was given; give some text, or the path of a file")
    return _source("given text", text)


def joined(sources: Sequence[TextSource]) -> TextSource:
    """Several texts as one."""
    if len(sources) == 1:
        return sources[0]
    return _source(" + ".join(source.name for source in sources), "\n\n".join(source.text for source in sources))


def interleaved(parts: Sequence[Tensor]) -> Tensor:
    """Windows int64 ``[N, context]`` of several texts, taking turns so that any end of them has its share of each."""
    places = torch.cat([torch.arange(len(p)) / len(p) for p in parts])
    return torch.cat(list(parts))[torch.argsort(places, stable=True)]


def split_text(source: TextSource, held_out_fraction: float) -> tuple[TextSource, TextSource]:
    """Cut a text in two: what to fit on, and its last part, held out.

    At the end of a paragraph, or of a line, sentence or word, whichever there is so near that the last part is not larger by
    more than half.
    """
    if not 0 < held_out_fraction < 1:
        raise InputError(f"the held-out fraction must lie between 0 and 1, got {held_out_fraction:g}")
    cut = int(len(source.text) * (1 - held_out_fraction))
    lowest = cut - (len(source.text) - cut) // 2
    ends = ((source.text.rfind(end, max(lowest, 1), cut), len(end)) for end in ("\n\n", "\n", ". ", " "))
    cut = next((place + size for place, size in ends if place >= 0), cut)
    kept, held = source.text[:cut], source.text[cut:]
    return _source(f"{source.name} (first part)", kept), _source(f"{source.name} (last part)", held)


def fit_texts(texts: Texts, hold_out: bool) -> tuple[list[TextSource], list[TextSource]]:
    """Split texts into what to fit on and, if asked, a tenth of each that is held out to check on (none otherwise)."""
    pairs = [_fit_and_check(source, hold_out) for source in given_texts(texts)]
    return [kept for kept, _ in pairs], [rest for _, rest in pairs if rest is not None]


def fit_and_check_text(path: Path | None, hold_out: bool) -> tuple[TextSource, TextSource | None]:
    """Split one text, a file or the embedded one, as ``fit_texts`` does several."""
    return _fit_and_check(read_text(path), hold_out)


def _fit_and_check(source: TextSource, hold_out: bool) -> tuple[TextSource, TextSource | None]:
    # The embedded text always keeps its last part, so that no bundle is ever fitted on what `kvcar eval` reads by default.
    if source.name != EMBEDDED_NAME and not hold_out:
        return source, None
    kept, rest = split_text(source, HELD_OUT_FRACTION)
    # The checksum of the whole text: that is what an evaluation compares with.
    return TextSource(kept.name, kept.text, source.sha256), rest if hold_out else None


def evaluation_texts(texts: Texts) -> list[TextSource]:
    """Texts to evaluate on: those given, or the part of the embedded text that no fit reads by default."""
    return [split_text(read_text(None), HELD_OUT_FRACTION)[1]] if texts is None else given_texts(texts)


def token_windows(tokenizer: Any, text: str, context: int, windows: int) -> Tensor:
    """Token ids int64 ``[windows, context]``: windows that do not overlap, spread evenly over the text.

    A window starts with the BOS token, counted in ``context``, where the tokenizer adds one by default.

    Raises:
        InputError: numbers that are not positive, or a text with fewer tokens than the windows need.
    """
    require(str, text=text)
    require(int, context=context, windows=windows)
    if context < 2 or windows < 1:
        raise InputError(f"needed: a context of at least 2 tokens and at least 1 window; got {context} and {windows}")
    bos = default_bos(tokenizer)
    taken = context - len(bos)
    # verbose=False: the whole text is longer than any model's limit, and is cut below.
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < taken * windows:
        most = len(ids) // taken
        raise InputError(
            f"the text has {len(ids)} tokens, but {windows} windows of {context} need {taken * windows}; give more text, "
            + (f"or ask for at most {most} windows" if most else f"or a context of at most {len(ids) + len(bos)}")
        )
    gap = (len(ids) - taken * windows) // max(windows - 1, 1)
    starts = [index * (taken + gap) for index in range(windows)]
    return torch.tensor([bos + ids[start : start + taken] for start in starts], dtype=torch.int64)


def windows_of_all(
    tokenizer: Any, sources: Sequence[TextSource], context: int, maximum: int, exactly: bool = False
) -> Tensor:
    """Windows int64 ``[N, context]`` of several texts, as many of each, taking turns.

    Args:
        tokenizer: the model's.
        sources: the texts.
        context: tokens of a window.
        maximum: windows in all; fewer where a text has fewer, unless ``exactly``.
        exactly: whether all of them must be there.

    Raises:
        InputError: a text is too short.
    """
    each, take = max(1, maximum // len(sources)), token_windows if exactly else up_to_windows
    return interleaved([take(tokenizer, source.text, context, each) for source in sources])


def up_to_windows(tokenizer: Any, text: str, context: int, maximum: int) -> Tensor:
    """As many windows as the text has, at most ``maximum``, at least one; raises InputError if it has none."""
    try:
        return token_windows(tokenizer, text, context, maximum)
    except InputError:
        found = token_windows(tokenizer, text, context, 1)
    low, high = 1, maximum
    while low < high:
        middle = (low + high + 1) // 2
        try:
            found, low = token_windows(tokenizer, text, context, middle), middle
        except InputError:
            high = middle - 1
    return found


def default_bos(tokenizer: Any) -> list[int]:
    """Tokens that a tokenizer begins every text with by default: its BOS token, or none."""
    ids = tokenizer("a")["input_ids"]
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and ids and ids[0] == bos else []


def _embedded() -> str:
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name].strip() for name in sorted(topics))


def _split_slice(path: str) -> tuple[Path, slice | None]:
    """``file[a:b]`` as the file and the slice; a file whose name really ends so is taken as it is."""
    found = re.fullmatch(r"(.+)\[(\d{0,18}):(\d{0,18})\]", path)
    if found is None or Path(path).exists():
        return Path(path), None
    start, stop = (int(part) if part else None for part in found.groups()[1:])
    return Path(found[1]), slice(start, stop)


def _number(number: int | None) -> str:
    return "" if number is None else str(number)


def _join_documents(path: Path, text: str, chosen: slice | None) -> str:
    documents = []
    # Other line breaks of Unicode may stand in a string.
    for number, line in enumerate(re.split(r"\r\n?|\n", text), 1):
        if not line.strip():
            continue
        try:
            document = json.loads(line, parse_int=_no_number)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {number} is not JSON: {error.msg}") from None
        except RecursionError:
            raise InputError(f"{path}, line {number} is nested too deep to be read") from None
        if not isinstance(document, dict) or not isinstance(document.get("text"), str):
            raise InputError(f"{path}, line {number} has no string field 'text'")
        _check_characters(f"{path}, line {number}", document["text"])
        documents.append(document["text"].strip())
    return "\n\n".join(documents if chosen is None else documents[chosen])


def _no_number(digits: str) -> int:
    """Any number: only the text is read, and Python refuses to convert very long ones."""
    del digits
    return 0


def _check_characters(where: str, text: str) -> None:
    """Refuse what is no text in any encoding."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where} has half a surrogate pair (U+{ord(text[error.start]):04X}, character {error.start}), which no tokenizer "
            "reads; remove it"
        ) from None


def _source(name: str, text: str) -> TextSource:
    _check_characters(name, text)
    return TextSource(name, text, hashlib.sha256(text.encode("utf-8")).hexdigest())


def checked_token_ids(token_ids: Any, vocabulary: int) -> Tensor:
    """Windows of token ids as int64 ``[N, T]``; raises InputError unless they are whole numbers that the model knows."""
    if not isinstance(token_ids, Tensor) or token_ids.ndim != 2 or token_ids.numel() == 0:
        got = (
            f"a tensor of shape {tuple(token_ids.shape)}" if isinstance(token_ids, Tensor) else type(token_ids).__name__
        )
        raise InputError(f"token_ids must be a tensor [windows, tokens] with something in it, got {got}")
    if token_ids.is_floating_point() or token_ids.is_complex() or token_ids.dtype == torch.bool:
        raise InputError(f"token_ids must be whole numbers, got {token_ids.dtype}")
    low, high = int(token_ids.min()), int(token_ids.max())
    if low < 0 or high >= vocabulary:
        raise InputError(f"token_ids must be 0 to {vocabulary - 1} for this model, got {low} to {high}")
    return token_ids.long()
