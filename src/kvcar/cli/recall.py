"""``kvcar eval --suite recall``: what it runs and prints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError
from .console import check_writable, out, progress_bars

if TYPE_CHECKING:
    from rich.table import Table

    from ..evaluate.recall import Recall

SUITES = ("recall",)


def run_suite(
    suite: str,
    model: str,
    bundle: str,
    items: int,
    only: list[str] | None,
    longest: int | None,
    window: int | None,
    json: Path | None,
    dtype: str,
    device: str,
) -> None:
    """Run a suite of generated items and print what it found."""
    if suite not in SUITES:
        raise InputError(f"there is no suite {suite!r}; known are: {', '.join(SUITES)}")
    from ..bundle import Bundle
    from ..evaluate.recall import check_recall, evaluate_recall, recall_figures
    from ..models.load import load_model
    from ..record import Record

    fitted = Bundle.from_pretrained(bundle)
    check_writable(json)
    # What is wrong with these is said before the model is loaded.
    check_recall(fitted, items, longest, only, window)
    with progress_bars() as tell:
        loaded = load_model(model, dtype, device, tell)
        found = evaluate_recall(
            loaded.model, fitted, loaded.tokenizer, items=items, longest=longest, tasks=only, window=window, on_progress=tell
        )  # fmt: skip
    out.print(recall_table(found))
    out.print(recall_in_words(found), highlight=False)
    if json is not None:
        config = {
            "model": model, "bundle": Path(bundle).name, "suite": suite, "items": items, "longest": longest, "tasks": only,
            "window": fitted.plan.cache.with_window(window).window, "dtype": str(loaded.model.dtype),
            "fit": fitted.fit.model_dump(mode="json"),
        }  # fmt: skip
        Record("recall", recall_figures(found), config).write(json)


def recall_table(recall: Recall) -> Table:
    """Make a table with a row for each task, and one for all of them."""
    from rich.table import Table

    table = Table(title="recall, scored on items that the full cache gets right", title_justify="left")
    table.add_column("task")
    for heading in ("asked", "full cache", "counted", "exact match", "points lost", "KL divergence"):
        table.add_column(heading, justify="right")
    rows = {**recall.tasks, "all": recall}
    for name, r in rows.items():
        exact, lost, kl = r.exact_match, r.points_lost, r.kl_divergence
        figures = (
            f"{100 * exact.value:.2f} %",
            f"{lost.value:.2f} ± {lost.stderr:.2f}",
            f"{kl.value:.5f} ± {kl.stderr:.5f}",
        )
        table.add_row(
            name, f"{len(r.items):,}", f"{100 * r.full_exact_match:.1f} %", f"{len(r.counted):,}",
            *(figures if r.counted else ("", "", "")),
        )  # fmt: skip
    return table


def recall_in_words(recall: Recall) -> str:
    """Say what was found, in a sentence or two."""
    out_of = len(recall.items) - len(recall.counted)
    if not recall.counted:
        return (
            f"the full cache fails all {len(recall.items):,} items, so they say nothing of this one; the model is too small for this "
            "suite, or was never trained to recall"
        )
    lost, missed = recall.points_lost, sum(not item.right for item in recall.counted)
    return (
        f"{missed:,} of {len(recall.counted):,} items lost, {lost.value:.2f} ± {lost.stderr:.2f} points below the full cache; "
        f"{out_of:,} that the full cache fails are left out, {recall.gained:,} of which this cache gets right. {_of_sure(recall)}"
    )


def _of_sure(recall: Recall) -> str:
    sure = recall.sure.items
    if not sure:
        return "The full cache is sure of none of them."
    return f"Of the {len(sure):,} that the full cache is sure of, {sum(not item.right for item in sure):,} are lost"
