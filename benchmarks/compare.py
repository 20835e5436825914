"""Every cache we can step, over the same text: kvcar's bundles, transformers' quantised caches, rival methods.

python benchmarks/compare.py wikitext-2/test.txt --fit-text wikitext-2/valid.txt --bundle layers5-5x=bundles/layers5-5x
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from baselines import BASELINES, BaselineCache, Calibration, Method
from contenders import (
    QUANTIZED,
    SIDE_BY_SIDE,
    Contender,
    bundle_contender,
    compare,
    groups,
    named_bundles,
    noise_floor,
    quantized_contenders,
)

from kvcar.bundle import Bundle
from kvcar.cache.attach import attach
from kvcar.cli.console import errors, out, progress_bars
from kvcar.cli.figures import fidelity_table
from kvcar.errors import InputError, KVCarError
from kvcar.evaluate.fidelity import fidelity_figures
from kvcar.fit.options import DEFAULT_PROFILE, PROFILES
from kvcar.models.load import load_model
from kvcar.progress import counter
from kvcar.record import Record
from kvcar.text import TextSource, joined, read_text, token_windows, windows_of_all

RESULTS = Path(__file__).parent / "results"


def main(
    test_text: Annotated[Path, typer.Argument(help="A .txt or .jsonl file; file.jsonl[500:] takes part of one.")],
    fit_text: Annotated[list[Path], typer.Option(help="What rivals are fitted on; repeatable, to join several.")],
    name: Annotated[str | None, typer.Option(help="Of the text, in records. Default: its folder and name.")] = None,
    bundle: Annotated[list[str] | None, typer.Option("--bundle", "-b", help="[NAME=]BUNDLE; repeatable.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Rows to run; all by default. Repeatable.")] = None,
    model: str = "demo",
    context: int = 4096,
    windows: int = 4,
    again: Annotated[bool, typer.Option("--again", help="Also rows whose records are there.")] = False,
    side_by_side: Annotated[int, typer.Option(min=1, help="Caches stepped at once.")] = SIDE_BY_SIDE,
    results: Annotated[Path, typer.Option(help="Folder of records.")] = RESULTS,
) -> None:
    """Step all rows; a record for each, ``compare-TEXT-ROW.json``, is written as soon as it is known."""
    results.mkdir(parents=True, exist_ok=True)
    text_name = name or f"{test_text.resolve().parent.name}-{test_text.stem}"
    bundles = named_bundles(bundle or [])
    sources, source = [read_text(path) for path in fit_text], read_text(test_text)
    fit_source = joined(sources)
    _tell_other_texts(bundles, fit_source)
    with progress_bars() as tell:
        loaded = load_model(model, on_step=tell)
        floor, lossless = noise_floor(loaded.model, model)
        names = _chosen([floor.name, *bundles, *QUANTIZED, *BASELINES], only)
        pending = [row for row in names if again or not _record(results, text_name, row).exists()]
        fitted = windows_of_all(loaded.tokenizer, sources, 1024, PROFILES[DEFAULT_PROFILE].fit_tokens // 1024)
        calibration = Calibration(loaded.model, fitted, tell)
        contenders = _contenders(pending, floor, bundles, calibration)
        ids = token_windows(loaded.tokenizer, source.text, context, windows)
        on_chunk = counter(tell, "compare", ids.numel() * len(groups(contenders, side_by_side)))
        common = {"model": model, "text": source.name, "text_name": text_name, "text_sha256": source.sha256,
                  "fit_text": fit_source.name, "fit_text_sha256": fit_source.sha256, "dtype": str(loaded.model.dtype)}  # fmt: skip
        done = {}
        with attach(loaded.model, lossless):
            for contender, result in compare(loaded.model, ids, contenders, on_chunk, side_by_side):
                config: dict[str, Any] = common | {"row": contender.name, "family": contender.family}
                record = Record("compare", fidelity_figures(result), config | {"method": contender.config})
                record.write(_record(results, text_name, contender.name))
                done[contender.name] = result
    if done:
        out.print(fidelity_table(done))


def _contenders(
    pending: Sequence[str], floor: Contender, bundles: Mapping[str, Bundle], calibration: Calibration
) -> list[Contender]:
    """Contenders of the rows that are to be run, but for those whose package is missing, which it tells."""
    found = [floor] if floor.name in pending else []
    found += [bundle_contender(name, each) for name, each in bundles.items() if name in pending]
    wanted = [name for name in QUANTIZED if name in pending]
    quantized, missing = quantized_contenders(calibration.model.config, calibration.geometry, wanted)
    for name, reason in missing.items():
        errors.print(f"[yellow]left out:[/] {name}: {reason}", soft_wrap=True)
    return found + quantized + baselines(calibration, [name for name in BASELINES if name in pending])


def baselines(calibration: Calibration, names: Sequence[str]) -> list[Contender]:
    """Contenders of rival methods, fitted where they need it."""
    return [_baseline(name, BASELINES[name](calibration), calibration) for name in names]


def _baseline(name: str, method: Method, calibration: Calibration) -> Contender:
    # Methods that code keys as the cache gets them have no use for the tables.
    rotary = calibration.rotary if method.keys_before_rope else {}
    make = partial(BaselineCache, method, calibration.geometry, rotary)
    return Contender(name, method.family, make, dict(method.config))


def _tell_other_texts(bundles: Mapping[str, Bundle], fit_source: TextSource) -> None:
    for name, bundle in bundles.items():
        if bundle.fit.text_sha256 != fit_source.sha256:
            errors.print(f"[yellow]note:[/] {name} was fitted on {bundle.fit.text}, the rivals on {fit_source.name}")


def _chosen(known: Sequence[str], only: Sequence[str] | None) -> list[str]:
    unknown = sorted(set(only or ()) - set(known))
    if unknown:
        raise InputError(f"no row is called {', '.join(unknown)}; there are {', '.join(known)}")
    return [name for name in known if not only or name in only]


def _record(folder: Path, text_name: str, row: str) -> Path:
    return folder / f"compare-{text_name}-{row}.json"


if __name__ == "__main__":
    try:
        typer.run(main)
    except KVCarError as error:
        raise SystemExit(f"error: {error}") from None
