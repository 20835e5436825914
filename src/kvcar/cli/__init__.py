"""The command line. Each command is a file that registers itself; ``main`` turns expected errors into messages.

A command's file imports torch and the rooms it needs when the command runs, so that ``--help`` and ``--version`` are quick.
"""

from __future__ import annotations

import re
import sys

from ..errors import KVCarError

# What the extra `cli` brings, by the names that are imported.
_PACKAGES = ("jinja2", "matplotlib", "rich", "typer", "yaml")


def _lacks(missing: ModuleNotFoundError) -> str | None:
    """Say what to install where a package of the extra is missing; None where something else is."""
    package = (missing.name or "").split(".")[0]
    if package not in _PACKAGES:
        return None
    return f"kvcar's command line needs the package {package}; install it with: pip install 'kvcar[cli]'"


try:
    from . import demo, evaluate, fit, generate, inspect, paper, paper_train, save, size, tasks
    from .app import app, option_names
except ModuleNotFoundError as missing:
    if _lacks(missing) is None:
        raise
    raise SystemExit(_lacks(missing)) from None

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
        errors.print(_in_options(str(error)), markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)
    except ModuleNotFoundError as missing:
        if _lacks(missing) is None:
            raise
        sys.exit(_lacks(missing))
    except KeyboardInterrupt:
        from .console import errors

        errors.print("interrupted; nothing half-written was left behind")
        sys.exit(130)


def _in_options(message: str) -> str:
    """Name options as the command line does, in a message that names those of Python."""
    known = option_names()
    message = message.replace("overwrite=True", "--force").replace("ask to overwrite it", "replace it with --force")
    return re.sub(r"(?<![\w'\"/.-])([a-z]+(?:_[a-z0-9]+)+)(?:=\w+)?", lambda m: known.get(m[1], m[0]), message)
