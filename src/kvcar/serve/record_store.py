"""A folder of records: written whole or not at all, looked at before they are promised, and never trusted."""

from __future__ import annotations

import logging
from collections import OrderedDict
from pathlib import Path

from torch import Tensor

from ..errors import ContextError, InputError, require
from ..files import read_regular, reason_of, write_whole
from .record_coder import RecordCoder
from .record_file import RecordKey
from .records import check_record, decode_record, encode_record

_log = logging.getLogger("kvcar.serve")

SUFFIX = ".kvr"
_REMEMBERED = 100_000
_AGAIN = "the record %s is computed again: %s"


class RecordStore:
    """Records of one bundle in a folder that several processes and machines may share.

    Args:
        folder: made where it does not exist; every bundle has a folder of its own in it.
        coder: of the bundle.

    Raises:
        InputError: the folder cannot be made.
    """

    def __init__(self, folder: str | Path, coder: RecordCoder) -> None:
        require(str, Path, folder=folder)
        self.coder = coder
        self.folder = Path(folder) / coder.bundle.digest[:32]
        self._sound: OrderedDict[str, tuple[tuple[int, int], bool]] = OrderedDict()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:
            raise InputError(
                f"cannot make the folder of records {folder}: {reason_of(error)}; choose one that you may write to"
            ) from None

    def path(self, key: RecordKey) -> Path:
        """Where the record of a key lies."""
        return self.folder / key.chain[:2] / (key.chain + SUFFIX)

    def holds(self, key: RecordKey) -> bool:
        """Whether there is a record that passes every check but decoding; one that does not is logged, and counts as none.

        A file is looked at once, and again when it was written again.
        """
        path = self.path(key)
        try:
            found = path.stat()
            seen = (found.st_mtime_ns, found.st_size)
            if self._sound.get(key.chain, (None, False))[0] != seen:
                self._remember(key, seen, self._check(path, key))
        except FileNotFoundError:
            return False
        except (OSError, ValueError) as error:
            _log.warning(_AGAIN, path.name, error)
            return False
        return self._sound[key.chain][1]

    def _check(self, path: Path, key: RecordKey) -> bool:
        """Look at a record; raises OSError and ValueError where it cannot be read."""
        data = read_regular(path, self.coder.largest_bytes)
        try:
            check_record(self.coder, data, key)
        except ContextError as error:
            _log.warning(_AGAIN, path.name, error)
            return False
        return True

    def read(self, key: RecordKey) -> tuple[Tensor, Tensor]:
        """Read keys (after RoPE) and values ``[L, H, T, D]``.

        Raises:
            ContextError: there is no such record, or it is damaged or foreign.
        """
        path = self.path(key)
        try:
            data = read_regular(path, self.coder.largest_bytes)
        except (OSError, ValueError) as error:
            raise ContextError(f"cannot read the record {path}: {reason_of(error)}; write it again") from None
        return decode_record(self.coder, data, key)

    def write(self, key: RecordKey, keys: Tensor, values: Tensor) -> int:
        """Write the record of a page ``[L, H, T, D]``; return its bytes, 0 where it could not be written, which is logged.

        A page that no record can hold (NaN) is not written either: nothing depends on a record being there.
        """
        path = self.path(key)
        try:
            data = encode_record(self.coder, keys, values, key)
            path.parent.mkdir(parents=True, exist_ok=True)  # somebody may have removed the whole folder
            write_whole(path, [data])
            found = path.stat()
        except (OSError, ValueError) as error:
            reason = reason_of(error) if isinstance(error, OSError) else error
            _log.warning("no record of %d tokens is written to %s: %s", keys.shape[2], path, reason)
            return 0
        self._remember(key, (found.st_mtime_ns, found.st_size), True)
        return len(data)

    def _remember(self, key: RecordKey, seen: tuple[int, int], sound: bool) -> None:
        self._sound[key.chain] = (seen, sound)
        self._sound.move_to_end(key.chain)
        while len(self._sound) > _REMEMBERED:
            self._sound.popitem(last=False)
