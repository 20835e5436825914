"""The command line. Each command is a file that registers itself; ``main`` turns expected errors into messages."""

from __future__ import annotations

import sys

from ..errors import KVCarError
from . import demo, evaluate, fit, generate, inspect, paper, paper_train, save, size, tasks
from .app import app
from .console import errors

__all__ = [
    "app",
    "demo",
    "evaluate",
    "fit",
    "generate",
    "inspect",
    "main",
    "paper",
    "paper_train",
    "save",
    "size",
    "tasks",
]


def main() -> None:
    """Entry point of the ``kvcar`` command: exits 0, 1 for a problem it can explain, 2 for wrong usage."""
    try:
        app()
    except KVCarError as error:
        errors.print("[bold red]error:[/] ", end="")
        errors.print(str(error), markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        errors.print("interrupted; nothing half-written was left behind")
        sys.exit(130)
