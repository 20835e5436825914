"""What the generated pages share: records by name, and tables in Markdown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def load(pattern: str, kind: str | None = None) -> list[dict[str, Any]]:
    """Read records whose file names fit ``pattern``, by name, each with its name as ``record``; of one kind if it is given."""
    paths = sorted(RESULTS.glob(pattern))
    records = [json.loads(path.read_text(encoding="utf-8")) | {"record": path.stem} for path in paths]
    return [r for r in records if kind is None or r["kind"] == kind]


def model_in_words(name: str) -> str:
    """Name a model; of the demo model also what its weights are."""
    return "demo model (dequantised Q4_1 weights)" if name == "demo" else name


def markdown(rows: list[list[str]]) -> str:
    """Write a table; the first row is its head."""
    head, *body = rows
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in body])
