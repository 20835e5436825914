"""Keeping ``torch.compile`` out of what must run as it is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

F = TypeVar("F", bound=Callable[..., Any])


def uncompiled(function: F) -> F:
    """``torch.compiler.disable`` with the type of what it is given: never traced, nor what it calls.

    For what keeps state that changes from pass to pass, which a trace would take for constant.
    """
    return cast(F, torch.compiler.disable(function))
