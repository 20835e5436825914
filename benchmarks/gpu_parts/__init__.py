"""What ``gpu.py`` finds out, a module for each part.

A part has ``sizes(rehearse)``, what it runs, JSON-ready and toy-sized for a rehearsal, and ``figures(device, sizes)``, which yields its figures again and again as they grow, so that a part that is stopped has told what
it knew.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

Sizes = dict[str, Any]
Figures = dict[str, Any]
SECONDS = {"basics": 70, "attention": 90, "model": 100, "tests": 110, "encoding": 30, "batch": 70}
"""How long each may take, in the order in which they run: first what everything rests on."""


def find(name: str) -> Any:
    """Import a part."""
    return import_module(f"{__name__}.{name}")


def reason(error: BaseException) -> str:
    """Say in a line what went wrong."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"
