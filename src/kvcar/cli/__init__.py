"""The command line. Each command is a file that registers itself; ``main`` turns expected errors into messages.

A command's file imports torch and the rooms it needs when the command runs, so that ``--help`` and ``--version`` are quick.
"""

from __future__ import annotations

import sys

from ..errors import KVCarError

try:
    from .app import app
except ModuleNotFoundError as missing:
    raise SystemExit(
        f"kvcar's command line needs the package {missing.name}; install it with: pip install 'kvcar[cli]'"
    ) from None
from . import demo, evaluate, fit, generate, inspect, paper, paper_train, save, size, tasks

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
    """Run the ``kvcar`` command: exits 0, 1 for a problem it can explain, 2 for wrong usage."""
    try:
        app()
    except KVCarError as error:
        from .console import errors

        errors.print("[bold red]error:[/] ", end="")
        errors.print(str(error), markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        from .console import errors

        errors.print("interrupted; nothing half-written was left behind")
        sys.exit(130)
