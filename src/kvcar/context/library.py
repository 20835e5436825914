"""The libraries of the extra ``store``, which only stored contexts need."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from ..errors import InputError


def store_library(name: str) -> Any:
    """Import a library; raises InputError, saying what to install, where it is missing."""
    try:
        return import_module(name)
    except ImportError:
        raise InputError(
            f"stored contexts need the library {name}; install it with: pip install 'kvcar[store]'"
        ) from None


def check_store() -> None:
    """Make sure, before any work is done, that the extra is installed; raises InputError."""
    for name in ("constriction", "zstandard"):
        store_library(name)
