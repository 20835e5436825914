"""Files and folders that come into being whole or not at all, even where the process that writes them is killed.

What is being written lies beside its target under a name of its own and is locked, as long as its process lives. What a
killed process left is found unlocked and removed by the next one that writes there.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows: nothing is locked, so nothing is taken for left over
    fcntl = None

_STAGING = re.compile(r"\.kvcar-[0-9a-f]{16}")


def reason_of(error: OSError | ValueError) -> str:
    """What the system said, without the path; a path with a NUL in it gives a ValueError."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def write_whole(path: Path, pieces: Iterable[bytes]) -> None:
    """Write a file, through to the disk, or leave what was there; its mode is what the umask leaves of 666.

    A symbolic link is followed.

    Raises:
        OSError, ValueError: it cannot be written.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "not a regular file")
    with staged_file(path.parent, pieces) as staging:
        os.replace(staging, path)
        sync_folder(path.parent)


def parsed_json(text: bytes | str) -> Any:
    """Parse JSON whose strings can be written again: half a surrogate pair, which JSON can name, is no text.

    Raises:
        ValueError: not JSON, or not text.
        RecursionError: nested too deep.
    """
    data = json.loads(text)
    json.dumps(data, ensure_ascii=False).encode()
    return data


def read_regular(path: Path, maximum: int | None = None) -> bytes:
    """Read all of a file; a pipe or a device would never end.

    Raises:
        OSError, ValueError: it cannot be read, is no regular file, or has more than ``maximum`` bytes.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "not a regular file")
    if maximum is not None and found.st_size > maximum:
        raise OSError(errno.EFBIG, f"it has {found.st_size} bytes, more than {maximum}")
    return path.read_bytes()


def remove_if_allowed(path: Path) -> None:
    """Remove a file that is of no use; where it is gone already or must stay, nothing depends on it."""
    with suppress(OSError):
        path.unlink()


@contextmanager
def staged_file(folder: Path, pieces: Iterable[bytes]) -> Iterator[Path]:
    """Write a file of a temporary name in ``folder``, to be renamed; removed at the end if it is still there."""
    remove_leftovers(folder)
    staging, descriptor = _made_and_locked(folder, _make_file)
    try:
        with open(descriptor, "wb") as out:
            for piece in pieces:
                out.write(piece)
            out.flush()
            os.fsync(out.fileno())
            yield staging
    finally:
        with suppress(OSError):
            staging.unlink()


@contextmanager
def staging_folder(parent: Path, mode: int = 0o777) -> Iterator[Path]:
    """Make a folder of a temporary name in ``parent``, to be renamed; removed at the end if it is still there."""
    remove_leftovers(parent)

    def make(path: Path) -> int | None:
        path.mkdir(mode)
        try:
            return -1 if fcntl is None else os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None

    staging, descriptor = _made_and_locked(parent, make)
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if descriptor >= 0:
            os.close(descriptor)


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Wait for other writers of the same folder, and keep them waiting; does nothing where the system has no such locks."""
    descriptor = -1 if fcntl is None else os.open(folder, os.O_RDONLY)
    try:
        _lock(descriptor)
        yield
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Bring renames in ``folder`` to the disk, where the system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def is_staging(name: str) -> bool:
    """Whether a file or folder of that name is one that is being written, or was."""
    return _STAGING.fullmatch(name) is not None


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes of this user left in ``folder``; never raises, as nothing depends on it."""
    if fcntl is None:
        return
    with suppress(OSError, ValueError):
        for entry in os.scandir(folder):
            if is_staging(entry.name) and entry.stat(follow_symlinks=False).st_uid == os.geteuid():
                _remove_unlocked(Path(entry.path))


def _remove_unlocked(path: Path) -> None:
    assert fcntl is not None
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()
        finally:
            os.close(descriptor)


def _make_file(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)


def _made_and_locked(folder: Path, make: Callable[[Path], int | None]) -> tuple[Path, int]:
    """Make a staging file or folder and lock it; one that was taken for left over before it was locked is made again."""
    while True:
        path = folder / f".kvcar-{secrets.token_hex(8)}"
        descriptor = make(path)
        if descriptor is None:
            continue
        _lock(descriptor)
        if descriptor < 0 or os.path.exists(path):
            return path, descriptor
        os.close(descriptor)


def _lock(descriptor: int) -> None:
    """Lock, waiting; a file system without locks does without, and then nothing is taken for left over either."""
    if fcntl is not None and descriptor >= 0:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
