"""Tables of zero-shot accuracy, for the pages that have some."""

from __future__ import annotations

from typing import Any

from pages import markdown


def task_section(heading: str, full: dict[str, Any], others: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """Accuracy with the full cache and with others, by their names; all records hold the same items, stepped with window 0."""
    head = ["cache"]
    for task in full["tasks"]:
        head += [f"{task}: accuracy", "difference to full", "items"]
    rows = [head, _row("full", full, None)]
    rows += [_row(f"`{name}`", record, full) for name, record in others]
    c = full["config"]
    note = (
        f"By lm-evaluation-harness, {c['step_tokens']} token(s) at a time, window 0, model in {c['dtype']}; "
        f"{'all items' if c['limit'] is None else 'items from the start'} of each file. Differences are in points, with the standard "
        "error of the paired difference: item by item, full cache against this one. Records: "
        + ", ".join(f"`{r['record']}`" for r in (full, *(record for _, record in others)))
    )
    return [heading, markdown(rows), note]


def _row(name: str, record: dict[str, Any], full: dict[str, Any] | None) -> list[str]:
    row = [name]
    for task, own in record["tasks"].items():
        difference = "" if full is None else _paired(own["correct"], full["tasks"][task]["correct"])
        row += [f"{100 * own['acc']:.2f} ± {100 * own['acc_stderr']:.2f} %", difference, str(own["items"])]
    return row


def _paired(own: list[int], full: list[int]) -> str:
    differences = [a - b for a, b in zip(own, full, strict=True)]
    n = len(differences)
    mean = sum(differences) / n
    variance = sum((d - mean) ** 2 for d in differences) / max(1, n - 1)
    return f"{100 * mean:+.2f} ± {100 * (variance / n) ** 0.5:.2f}"
