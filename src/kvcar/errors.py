"""The exceptions kvcar raises. Every message says what was got, what was expected and what to do."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from pathlib import Path
from typing import Any


class KVCarError(Exception):
    """Base of every error that kvcar raises on purpose; the command line prints it without a traceback."""


class InputError(KVCarError, ValueError):
    """Text, prompts, options or files that cannot be used as given."""


class UnsupportedModelError(KVCarError):
    """The model has a structure this version cannot compress without changing what the model computes."""


class PlanError(KVCarError, ValueError):
    """A plan that is malformed, of an unknown version, or does not fit its model's geometry."""


class BundleError(KVCarError):
    """A bundle on disk that is missing, incomplete, damaged or not readable by this version."""


class ModelMismatchError(BundleError):
    """A bundle that was fitted for another model than the one it is being used with."""


class FitError(KVCarError):
    """Fitting cannot go on: non-finite activations, too little text, a target that no plan reaches."""


class AttachError(KVCarError):
    """A cache and a model that were not connected by ``kvcar.attach``, or were connected twice."""


class CacheStateError(KVCarError):
    """A cache that was asked for something its state does not allow, such as more positions than the model has."""


class ContextError(KVCarError):
    """A stored context that is missing, damaged, of an unknown version, or was saved with another bundle."""


class KernelError(KVCarError):
    """A kernel backend that is asked for and cannot be had here, or that cannot be compiled."""


_KINDS = {int: "a whole number", float: "a number", str: "a string", Path: "a path", Callable: "a function"}


def require(*kinds: Any, optional: bool = False, **given: Any) -> None:
    """Refuse values that are of none of the kinds, by the names they are given as.

    Args:
        kinds: types; for float any real number will do, for int no truth value.
        optional: whether None will do.
        given: values by the names that their caller knows them by.

    Raises:
        InputError: with name and value.
    """
    for name, value in given.items():
        if (value is None and optional) or any(_is_a(kind, value) for kind in kinds):
            continue
        wanted = " or ".join(_KINDS.get(kind, f"a {kind.__name__}") for kind in kinds)
        raise InputError(f"{name} must be {wanted}, got {value!r}")


def _is_a(kind: Any, value: object) -> bool:
    if kind is float:
        return isinstance(value, Real) and not isinstance(value, bool)
    return type(value) is int if kind is int else isinstance(value, kind)
