"""How long-running work tells what it is doing, without knowing who listens."""

from __future__ import annotations

from collections.abc import Callable

OnProgress = Callable[[str, int, int], None]
"""(what is being done, how much is done, out of how much) -> None."""


def silent(what: str, done: int, total: int) -> None:
    """Listen to nothing."""
    del what, done, total


def counter(on_progress: OnProgress, what: str, total: int) -> Callable[[int], None]:
    """A function that is told how much more is done, and passes on how much is done in all."""
    done = 0

    def count(more: int) -> None:
        nonlocal done
        done += more
        on_progress(what, done, total)

    return count
