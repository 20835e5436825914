"""Which part of which text a command fits on and which it evaluates on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import InputError
from ..text import TextSource, interleaved, read_text, split_text, token_windows

HELD_OUT_FRACTION = 0.1
_CONTEXT = 2048


def fit_and_check_text(path: Path | None, hold_back: bool) -> tuple[TextSource, TextSource | None]:
    """What to fit on and, if asked, what to hold back to check on. The embedded text always keeps its last part for
    evaluation, so that no bundle is ever fitted on what ``kvcar eval`` reads by default.
    """
    source = read_text(path)
    if path is not None and not hold_back:
        return source, None
    kept, held = split_text(source, HELD_OUT_FRACTION)
    return TextSource(kept.name, kept.text, source.sha256), held


def fit_texts(paths: Sequence[Path] | None, hold_back: bool) -> tuple[list[TextSource], list[TextSource]]:
    """The same of several texts: what to fit on, and what is held back of each (nothing if it is not asked for)."""
    pairs = [fit_and_check_text(path, hold_back) for path in (paths or [None])]
    return [kept for kept, _ in pairs], [held for _, held in pairs if held is not None]


def windows_of_all(tokenizer: Any, sources: Sequence[TextSource], context: int, most: int) -> Tensor:
    """Up to ``most`` windows int64 ``[N, context]``, as many of each text, taking turns."""
    each = max(1, most // len(sources))
    return interleaved([up_to_windows(tokenizer, source.text, context, each) for source in sources])


def evaluation_text(path: Path | None) -> TextSource:
    """The text to evaluate on: a file, or the held-out part of the embedded text."""
    return read_text(path) if path is not None else split_text(read_text(None), HELD_OUT_FRACTION)[1]


def evaluation_context(asked: int | None, most: int) -> int:
    """Tokens of a window to evaluate on: as asked, or 2,048 or what the model has; raises InputError above that."""
    context = min(_CONTEXT, most) if asked is None else asked
    if context > most:
        raise InputError(f"a context of {context} tokens is longer than the model's {most} positions")
    return context


def up_to_windows(tokenizer: Any, text: str, context: int, most: int) -> Tensor:
    """As many windows as the text has, at most ``most``, at least one; raises InputError if it has none."""
    low, high = 1, most
    try:
        return token_windows(tokenizer, text, context, most)
    except InputError:
        first = token_windows(tokenizer, text, context, 1)
    while low < high:
        middle = (low + high + 1) // 2
        try:
            first = token_windows(tokenizer, text, context, middle)
            low = middle
        except InputError:
            high = middle - 1
    return first
