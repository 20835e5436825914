"""One measurement with where it comes from. What is printed, plotted or written into docs is read from records."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from .errors import InputError
from .files import reason_of, write_whole
from .version import __version__

# What measurements themselves write: the first record of a run must not make the tree of the next one look changed.
_GENERATED = ("benchmarks/results", "docs/results", "README.md")


@cache
def source_state(package: Path = Path(__file__).parent) -> tuple[str | None, bool | None]:
    """Name the commit that ``package`` was checked out from, and whether its tree was clean; (None, None) outside of one.

    Generated files may differ. A checkout counts only where the package is its ``src/kvcar``: an environment that lies in
    the checkout of another project says nothing.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        root = Path(git("rev-parse", "--show-toplevel"))
        if (root / "src" / "kvcar").resolve() != package.resolve():
            return None, None
        commit = git("rev-parse", "HEAD")
        changed = git("status", "--porcelain", "--", ":(top)", *(f":(top,exclude){path}" for path in _GENERATED))
    except (OSError, subprocess.CalledProcessError):
        return None, None
    return commit, not changed


def provenance(command: list[str] | None = None) -> dict[str, Any]:
    """Collect versions, commit, machine and command of this process, as JSON-ready values.

    Args:
        command: the command line to record; the process' own by default, program name without its folder.
    """
    import torch
    import transformers

    commit, tree_clean = source_state()
    own = ["kvcar" if not sys.argv[0] else Path(sys.argv[0]).name, *sys.argv[1:]]
    return {
        "command": " ".join(command or own),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "kvcar": __version__,
        "commit": commit,
        "tree_clean": tree_clean,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu",
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


@dataclass(frozen=True)
class Record:
    """Figures, the configuration they were measured with, and their provenance.

    Attributes:
        kind: what was measured ("fidelity", "memory", ...).
        figures: names with units, and numbers.
        config: everything that was chosen.
        provenance: see ``provenance``.
    """

    kind: str
    figures: dict[str, Any]
    config: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=provenance)

    def as_dict(self) -> dict[str, Any]:
        """Put figures at the top level, the rest below names of their own."""
        return {"kind": self.kind, **self.figures, "config": self.config, "provenance": self.provenance}

    def write(self, path: Path) -> None:
        """Write as JSON, whole or not at all; raises InputError where that cannot be done."""
        write_json(path, self.as_dict())


def write_json(path: Path, data: Any) -> None:
    """Write ``data`` as JSON through a temporary neighbour; raises InputError where that cannot be done."""
    write_text(path, json.dumps(data, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file through a temporary neighbour; raises InputError where that cannot be done."""
    try:
        write_whole(path, [text.encode()])
    except (OSError, ValueError) as error:
        raise InputError(
            f"cannot write {path}: {reason_of(error)}; choose a folder that exists and that you may write to"
        ) from None
