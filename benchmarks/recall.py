"""Recall of caches at several sizes, side by side with the full cache: the items of ``kvcar eval --suite recall``, more of them.

python benchmarks/recall.py --name demo -b default-8x=bundles/demo-8x -b small-12x=bundles/small-12x --items 1500
python benchmarks/recall.py --name rivals --baseline kivi-4bit --baseline turboquant-4bit --baseline quanto-4bit --items 150
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from baselines import BASELINES, Calibration
from compare import baselines
from contenders import QUANTIZED, Contender, bundle_contender, named_bundles, noise_floor, quantized_contenders

from kvcar.cache.attach import attach
from kvcar.cli.console import progress_lines
from kvcar.errors import KVCarError
from kvcar.evaluate.recall import Recall, RecallItem, measure_recall, recall_figures
from kvcar.evaluate.recall_items import Passage, recall_passages
from kvcar.geometry import BFLOAT16_BYTES
from kvcar.models.load import LoadedModel, load_model
from kvcar.progress import counter
from kvcar.record import Record
from kvcar.sizes import REFERENCE_TOKENS, stored_bytes
from kvcar.text import read_text, token_windows

RESULTS = Path(__file__).parent / "results"
# Windows and residuals of all caches, and a page.
EXACT_TOKENS = 192
SHARES = {"copy": 0.13, "pairs": 0.34, "passkey": 0.007, "needles": 0.13, "repeated": 0.3, "turns": 0.08}
_LONGEST = {"needles": 2048, "turns": 1100, "passkey": 2048}
_TOGETHER = 40
_FIT_WINDOWS = 4
_SIZE_STEPS = (128, 512, 1024, 2048, 4096)


def main(
    name: Annotated[str, typer.Option(help="Of the record.")],
    bundle: Annotated[list[str] | None, typer.Option("--bundle", "-b", help="[NAME=]BUNDLE; repeatable.")] = None,
    baseline: Annotated[list[str] | None, typer.Option(help="A rival method or a cache of transformers.")] = None,
    fit_text: Annotated[Path | None, typer.Option(help="What rivals are fitted on that need it.")] = None,
    items: Annotated[int, typer.Option(help="Questions of all tasks together.")] = 1500,
    longest: int = 6144,
    seed: int = 0,
    model: str = "demo",
) -> None:
    """Ask all questions of all caches; the record in ``results/`` is written anew after every few passages."""
    loaded, tell = load_model(model), progress_lines(60)
    contenders = _contenders(loaded, bundle or [], baseline or [], fit_text)
    passages = mixed_passages(loaded.tokenizer, items, longest, seed)
    count = counter(tell, "ask", sum(len(passage.ids) for passage in passages))
    found: dict[str, list[RecallItem]] = {contender.name: [] for contender, _ in contenders}
    common = {"model": model, "name": name, "exact_tokens": EXACT_TOKENS, "longest": longest, "seed": seed}
    _, lossless = noise_floor(loaded.model, model)
    with attach(loaded.model, lossless):
        for index, passage in enumerate(passages):
            caches = {contender.name: contender.make for contender, _ in contenders}
            # Rivals hold one sequence.
            asked = measure_recall(loaded.model, [passage], caches, count, together=1 if baseline else 8)
            for row, recall in asked.items():
                found[row] += [replace(item, passage=index) for item in recall.items]
            if index % 2 or index == len(passages) - 1:
                rows = {contender.name: _row(contender, found[contender.name], size) for contender, size in contenders}
                config = common | {"passages": index + 1, "passages_planned": len(passages)}
                Record("recall", {"caches": rows}, config).write(RESULTS / f"recall-{name}.json")


def mixed_passages(tokenizer: Any, items: int, longest: int, seed: int) -> list[Passage]:
    """Passages of all tasks in turn, so that a run that is broken off has its share of each."""
    by_task = [
        recall_passages(
            tokenizer, max(1, round(items * share / (0.125 if task == "passkey" else 1))), seed=seed, exact_tokens=EXACT_TOKENS,
            longest=min(longest, _LONGEST.get(task, longest)), tasks=[task], together=_TOGETHER,
        )
        for task, share in SHARES.items()
    ]  # fmt: skip
    draw = random.Random(seed)
    placed = [((place + draw.random()) / len(each), passage) for each in by_task for place, passage in enumerate(each)]
    return [passage for _, passage in sorted(placed, key=lambda pair: pair[0])]


def _contenders(
    loaded: LoadedModel, bundles: Sequence[str], rivals: Sequence[str], fit_text: Path | None
) -> list[tuple[Contender, float | None]]:
    """Caches to ask, each with how many times smaller it is at 4,096 tokens where that is known beforehand."""
    named = named_bundles(list(bundles))
    found: list[tuple[Contender, float | None]] = []
    for name, each in named.items():
        size = each.plan.geometry.full_bytes(REFERENCE_TOKENS) / stored_bytes(
            each.plan, REFERENCE_TOKENS, BFLOAT16_BYTES
        )
        found.append((bundle_contender(name, each), size))
    if rivals:
        windows = token_windows(loaded.tokenizer, read_text(fit_text).text, 1024, _FIT_WINDOWS)
        calibration = Calibration(loaded.model, windows)
        quantized = [name for name in rivals if name in QUANTIZED]
        ready, missing = quantized_contenders(loaded.model.config, calibration.geometry, quantized)
        print(missing or "", flush=True)
        ready += baselines(calibration, [name for name in rivals if name in BASELINES])
        found += [(contender, None) for contender in ready]
    return found


def _row(contender: Contender, items: Sequence[RecallItem], size: float | None) -> dict[str, Any]:
    recall = Recall(tuple(items))
    by_size = {task: sizes_of(each) for task, each in recall.tasks.items()}
    method = {key: value for key, value in contender.config.items() if key != "fit"}
    figures = recall_figures(recall, with_items=False)
    return figures | {"by_size": by_size, "family": contender.family, "times_smaller": size, "method": method}


def sizes_of(recall: Recall) -> list[dict[str, Any]]:
    """Items of a task by how hard they are: pairs to choose from, or tokens in classes."""
    classes: dict[int, list[RecallItem]] = {}
    for item in recall.items:
        least = item.size if item.task == "pairs" else max(step for step in (0, *_SIZE_STEPS) if step <= item.size)
        classes.setdefault(least, []).append(item)
    rows = []
    for least, items in sorted(classes.items()):
        part = Recall(tuple(items))
        rows.append(
            {"size": least, "asked": len(items), "counted": len(part.counted), "exact_match": part.exact_match.value}
        )
    return rows


if __name__ == "__main__":
    try:
        typer.run(main)
    except KVCarError as error:
        raise SystemExit(f"error: {error}") from None
