"""The kernels' own tests, natively: everything that asks for Triton's device."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from . import Figures, Sizes

ROOT = Path(__file__).parents[2]
_OUTCOMES = "PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS"
_LINES = (re.compile(rf"^\[gw\d+\] \[ *\d+%\] ({_OUTCOMES}) (tests/.*)$"), re.compile(rf"^(tests/.*?) ({_OUTCOMES})\b"))
_WHY = re.compile(r"^(?:FAILED|ERROR) (tests/.*?) - (.*)$")


def sizes(rehearse: bool) -> Sizes:
    """Files of tests, or one test; processes that share the device."""
    if rehearse:
        return {
            "tests": ["tests/kernels/test_triton_encode.py::test_infinite_latents_are_clamped"],
            "processes": 0,
            "without": "",
        }
    files = ["test_triton_attend.py", "test_triton_encode.py", "test_registry.py"]
    return {"tests": [f"tests/kernels/{name}" for name in files], "processes": 8, "without": "compile_for"}


def figures(device: torch.device, sizes: Sizes) -> Iterator[Figures]:
    """See the package; lines of pytest are read as they come."""
    del device  # the tests find it themselves
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-v",
        "-rfE",
        "--tb=short",
        "-p",
        "no:cacheprovider",
        "-n",
        str(sizes["processes"]),
    ]
    command += ["-k", f"not {sizes['without']}"] if sizes["without"] else []
    running = subprocess.Popen(
        [*command, *sizes["tests"]], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert running.stdout is not None
    found: Figures = {}
    for found in read(running.stdout):
        yield found
    yield found | {"exit": running.wait()}


def read(lines: Iterable[str]) -> Iterator[Figures]:
    """Count outcomes, and keep what failed with its reason and the last lines."""
    outcomes: dict[str, str] = {}
    reasons: dict[str, str] = {}
    last: list[str] = []
    yield _told(outcomes, reasons, last)
    for line in (line.rstrip() for line in lines):
        last = [*last, line][-15:]
        if why := _WHY.match(line):
            reasons[why[1]] = why[2]
            yield _told(outcomes, reasons, last)
        elif apart := _LINES[0].match(line):
            outcomes[apart[2]] = apart[1]
            yield _told(outcomes, reasons, last)
        elif alone := _LINES[1].match(line):
            outcomes[alone[1]] = alone[2]
            yield _told(outcomes, reasons, last)
    yield _told(outcomes, reasons, last)


def _told(outcomes: dict[str, str], reasons: dict[str, str], last: list[str]) -> Figures:
    failed = [name for name, outcome in outcomes.items() if outcome in ("FAILED", "ERROR")]
    return {
        "outcomes": dict(Counter(outcome.lower() for outcome in outcomes.values())),
        "failed": {name: reasons.get(name, "") for name in failed},
        "last_lines": last,
    }
