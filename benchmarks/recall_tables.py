"""``docs/results/recall.md`` and its plot from the records of ``recall.py``. Called by ``tables.py``."""

from __future__ import annotations

import math
from typing import Any

from pages import load, markdown, model_in_words

from kvcar.report.plots import Point, frontier

PLOT = "recall.svg"
_HEAD = """# Recall

Generated from the records in `benchmarks/results/` by `benchmarks/tables.py`. What a model must find far back, through the cache
(`benchmarks/recall.py`, the items of `kvcar eval --suite recall`): random words copied (*copy*), the number of one of 20 to 140 words
(*pairs*), a pass key, one of 16 needles of one form in English text, pairs before a token that is repeated hundreds of times
(*repeated*), and a conversation whose cache was saved and loaded (*turns*; rivals are not saved). What is asked for lies further
back than any of the caches keeps tokens exactly.

Items that the full cache fails are left out. Points are lost below its 100 %; ± is one standard error, passages taken as independent.
*Gained* are items that only this cache gets right: as many of those lost may be close calls. *Sure* are counted items that are none:
each token of the answer leads all others by one nat at least with the full cache (2.7 times as likely as the next one). *Right of all
asked* leaves nothing out: items that each cache gets right, whatever the other does. KL divergence is of the answers, in nats per token."""


def recall_pages() -> dict[str, str]:
    """File name below ``docs/results`` -> content; nothing where there are no records."""
    records = load("recall-*.json", "recall")
    if not records:
        return {}
    sections = [_HEAD, f"![Divergence of answers against size]({PLOT})", *map(_section, records)]
    return {"recall.md": "\n\n".join(sections) + "\n", PLOT: _plot(records)}


def _section(r: dict[str, Any]) -> str:
    config, caches = r["config"], r["caches"]
    all_of_them = [[
        "cache", "times smaller", "asked", "counted", "points lost", "gained", "sure", "points lost of these",
        "right of all asked, full cache and this", "KL divergence",
    ]]  # fmt: skip
    for name, f in caches.items():
        all_of_them.append([
            f"`{name}`", f"{_size(name, f):.2f}", f"{f['asked']:,}", f"{f['counted']:,}",
            f"{f['points_lost']:.2f} ± {f['points_lost_stderr']:.2f}", f"{f['gained']}",
            f"{f['sure']:,}", f"{f['sure_points_lost']:.2f} ± {f['sure_points_lost_stderr']:.2f}" if f["sure"] else "",
            f"{100 * f['full_exact_match']:.2f} %, {100 * _right_of_all(f):.2f} %",
            f"{f['kl_divergence']:.4f} ± {f['kl_divergence_stderr']:.4f}",
        ])  # fmt: skip
    return "\n\n".join([
        f"## `{config['name']}`",
        f"{model_in_words(config['model'])}; passages of up to {config['longest']:,} tokens, {config['passages']} of "
        f"{config['passages_planned']} planned ones read. Record: `{r['record']}`.",
        markdown(all_of_them),
        "By task, points lost (items counted of those asked):",
        _by_task(caches),
        "By how far back, or by the number of pairs, exact match in percent (items counted):",
        *map(_by_size, _tasks(caches)),
    ])  # fmt: skip


def _right_of_all(figures: dict[str, Any]) -> float:
    """Share of all items that a cache gets right: those counted that it does not lose, and those that only it gets."""
    return (figures["counted"] * figures["exact_match"] + figures["gained"]) / figures["asked"]


def _tasks(caches: dict[str, Any]) -> list[tuple[str, dict[str, list[dict[str, Any]]]]]:
    """Each task with the classes of every cache."""
    tasks = dict.fromkeys(task for f in caches.values() for task in f["by_size"])
    return [(task, {name: f["by_size"].get(task, []) for name, f in caches.items()}) for task in tasks]


def _by_task(caches: dict[str, Any]) -> str:
    tasks = list(dict.fromkeys(task for f in caches.values() for task in f["tasks"]))
    rows = [["cache", *tasks]]
    for name, f in caches.items():
        cells = []
        for task in tasks:
            found = f["tasks"].get(task)
            lost = "" if not found or not found["counted"] else f"{found['points_lost']:.1f} "
            cells.append(f"{lost}({found['counted']} of {found['asked']})" if found else "")
        rows.append([f"`{name}`", *cells])
    return markdown(rows)


def _by_size(task: tuple[str, dict[str, list[dict[str, Any]]]]) -> str:
    name, caches = task
    sizes = sorted({row["size"] for rows in caches.values() for row in rows})
    unit = "" if name == "pairs" else "from "
    table = [[name, *(f"{unit}{size:,}" for size in sizes)]]
    for cache, rows in caches.items():
        by_size = {row["size"]: row for row in rows}
        cells = []
        for size in sizes:
            row = by_size.get(size)
            counted = row["counted"] if row else 0
            cells.append(f"{100 * row['exact_match']:.1f} ({counted})" if row and counted else "")
        table.append([f"`{cache}`", *cells])
    return markdown(table)


def _size(name: str, figures: dict[str, Any]) -> float:
    """Times smaller at 4,096 tokens: as recorded, or of the same rival beside all others (`compare.py`)."""
    if figures["times_smaller"] is not None:
        return figures["times_smaller"]
    known = [r["times_smaller"] for r in load("compare-*.json", "compare") if r["config"]["row"] == name]
    return known[0] if known else math.nan


def _plot(records: list[dict[str, Any]]) -> str:
    series: dict[str, list[Point]] = {}
    for r in records:
        for name, f in r["caches"].items():
            point = Point(name, _size(name, f), f["kl_divergence"], f["kl_divergence_stderr"])
            series.setdefault(f["family"], []).append(point)
    return frontier(series)
