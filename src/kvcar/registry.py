"""A registry is the list: tests, docs and the command line enumerate it; adding an entry is one decorator.

And packages that can be called, where a function and the package that holds it share a name.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from types import ModuleType
from typing import Any, Generic, TypeVar, cast

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


def _one_to_a_line(function: Callable[..., Any]) -> str:
    """Write a signature with a parameter on each line, defaults by name where they are functions."""
    parameters, starred = [], False
    found = inspect.signature(function)
    for each in found.parameters.values():
        if each.kind is each.KEYWORD_ONLY and not starred:
            parameters, starred = [*parameters, "*"], True
        default = getattr(each.default, "__name__", repr(each.default))
        kind = "" if each.annotation is each.empty else f": {each.annotation}"
        parameters.append(each.name + kind + ("" if each.default is each.empty else f" = {default}"))
    return "(\n" + "".join(f"    {each},\n" for each in parameters) + f") -> {found.return_annotation}"


def callable_package(package: str, home: str) -> None:
    """Let a package be called as the function of its own name, which its module ``home`` has.

    ``kvcar.evaluate(...)`` and ``from kvcar.evaluate.fidelity import ...`` both work then, whichever comes first: importing
    a package binds its name in its parent, and what is bound there can be called. The module is loaded by the first call.

    Args:
        package: its full name; call this from its ``__init__``, with ``__name__``.
        home: the module inside it.
    """
    name = package.rpartition(".")[2]

    def function() -> Callable[..., Any]:
        return getattr(import_module(f"{package}.{home}"), name)

    class CallablePackage(ModuleType):
        def __call__(self, *args: Any, **options: Any) -> Any:
            return function()(*args, **options)

        @property
        def __wrapped__(self) -> Callable[..., Any]:
            """By which ``inspect.signature`` and the documents find the function."""
            return function()

        @property
        def __doc__(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
            """The function's, with its parameters: what ``help`` shows."""
            called = function()
            first, _, rest = (inspect.getdoc(called) or "").partition("\n")
            return f"{first}\n\n{package}{_one_to_a_line(called)}\n{rest}"

    sys.modules[package].__class__ = CallablePackage
