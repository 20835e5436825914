"""A registry is the list: tests, docs and the command line enumerate it; adding an entry is one decorator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar, cast

from .errors import InputError

T = TypeVar("T")
Entry = TypeVar("Entry")


class Registry(Generic[T]):
    """Named entries of one sort, in the order in which they were registered."""

    def __init__(self, sort: str) -> None:
        self._sort = sort
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[Entry], Entry]:
        """Return a decorator that files its argument under ``name``."""

        def file_under_name(entry: Entry) -> Entry:
            if name in self._entries:
                raise ValueError(f"{self._sort} {name!r} is registered twice")
            self._entries[name] = cast(T, entry)
            return entry

        return file_under_name

    def __getitem__(self, name: str) -> T:
        try:
            return self._entries[name]
        except KeyError:
            known = ", ".join(self._entries) or "none"
            raise InputError(f"unknown {self._sort} {name!r}; known are: {known}") from None

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)
