"""What commands print with: results on stdout, progress and errors on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ..errors import InputError
from ..progress import OnProgress

# A pipe or a log file has no width of its own; 80 columns would fold every table.
_PIPE_COLUMNS = 120

out = Console(width=None if sys.stdout.isatty() else _PIPE_COLUMNS)
errors = Console(stderr=True, width=None if sys.stderr.isatty() else _PIPE_COLUMNS)


@contextmanager
def progress_bars() -> Iterator[OnProgress]:
    """Show bars on stderr, one for each kind of work; without a terminal, a line now and then and one as each ends."""
    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    ]
    if not errors.is_terminal:
        yield progress_lines()
        return
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=errors) as bars:

        def tell(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield tell


def progress_lines(every_seconds: float = 15.0) -> OnProgress:
    """Print what is going on as lines: where it stands and how long it may take, now and then, and that it is done."""
    began: dict[str, float] = {}
    last = time.monotonic()

    def tell(what: str, done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        first = began.setdefault(what, now)
        if done >= total:
            errors.print(f"{what}: done, {now - first:.0f} s", highlight=False)
        elif now - last >= every_seconds:
            left = f", about {(now - first) / done * (total - done):.0f} s left" if done and now > first else ""
            errors.print(f"{what}: {done:,} of {total:,}{left}", highlight=False)
        else:
            return
        last = now

    return tell


def step_teller() -> Callable[[dict[str, Any]], None]:
    """Print, at every validation of a training, where it stands: the mean loss since the last one and what it found."""
    losses: list[float] = []

    def tell(entry: dict[str, Any]) -> None:
        if "loss" in entry:
            losses.append(entry["loss"])
            return
        since = f"loss {sum(losses) / len(losses):.4f}, " if losses else ""
        losses.clear()
        errors.print(
            f"{entry['stage']}, step {entry['step']}: {since}validation {entry['validation_loss']:.4f} nats per token",
            highlight=False,
        )

    return tell


def check_writable(path: Path | None) -> None:
    """Make sure, before any work is done, that a file can be written; raises InputError."""
    if path is None:
        return
    if path.is_dir():
        raise InputError(f"{path} is a folder; give the name of a file")
    try:
        existed = path.exists()
        with path.open("a"):
            pass
        if not existed:
            path.unlink()
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {error.strerror}; choose a folder that exists and that you may write to"
        ) from None
