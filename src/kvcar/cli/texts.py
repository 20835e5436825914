"""Which part of which text a command fits on and which it evaluates on."""

from __future__ import annotations

from pathlib import Path

from ..errors import InputError
from ..text import HELD_OUT_FRACTION, TextSource, read_text, split_text, up_to_windows, windows_of_all

__all__ = ["evaluation_context", "evaluation_text", "fit_and_check_text", "up_to_windows", "windows_of_all"]

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


def evaluation_text(path: Path | None) -> TextSource:
    """The text to evaluate on: a file, or the held-out part of the embedded text."""
    return read_text(path) if path is not None else split_text(read_text(None), HELD_OUT_FRACTION)[1]


def evaluation_context(asked: int | None, most: int) -> int:
    """Tokens of a window to evaluate on: as asked, or 2,048 or what the model has; raises InputError above that."""
    context = min(_CONTEXT, most) if asked is None else asked
    if context > most:
        raise InputError(f"a context of {context} tokens is longer than the model's {most} positions")
    return context
