"""The figures of a record from the timings of a race."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from statistics import mean
from typing import Any, Literal

from .figures import Line, break_even, fit_line, ratios, spread
from .race import Timings
from .runners import FULL, Runner

Centre = Literal["median", "mean"]
CENTRES: tuple[Centre, Centre] = ("median", "mean")


def decode_figures(timings: Sequence[Timings], families: dict[str, str], decoded: int) -> dict[str, Any]:
    """Decode steps by context and contender, lines through them, and where the lines cross.

    ``decoded`` is how many tokens were decoded at each context: steps were taken half of that later on average.
    """
    contexts = [timing.context + decoded / 2 for timing in timings]
    lines = {centre: _lines(timings, contexts, centre) for centre in CENTRES}
    return {
        "decode": [_at(timing) for timing in timings],
        "lines": {centre: {n: _line(line) for n, line in by.items()} for centre, by in lines.items()},
        "break_even": {centre: _crossings(by, families, contexts) for centre, by in lines.items()},
    }


def _at(timing: Timings) -> dict[str, Any]:
    rounds = {name: [1000 * sum(steps) for steps in each] for name, each in timing.step_seconds.items()}
    rows = {}
    for name, each in timing.step_seconds.items():
        rows[name] = {
            "step": spread([1000 * second for steps in each for second in steps]).as_dict("_ms"),
            "ratio_to_full": ratios(rounds[name], rounds[FULL]).as_dict(),
            "ratio_of_means": mean(rounds[name]) / mean(rounds[FULL]),
            "held_bytes": timing.held_bytes[name],
            "round_ms": [round(ms, 3) for ms in rounds[name]],
        }
    return {"context": timing.context, "contenders": rows}


def _lines(timings: Sequence[Timings], contexts: Sequence[float], centre: Centre) -> dict[str, Line]:
    found = {}
    for name in timings[0].step_seconds:
        spreads = [spread([1000 * second for steps in t.step_seconds[name] for second in steps]) for t in timings]
        line = fit_line(contexts, [getattr(each, centre) for each in spreads])
        if line is not None:
            found[name] = line
    return found


def _line(line: Line) -> dict[str, float]:
    return {
        "ms_per_1000_tokens": 1000 * line.slope,
        "intercept_ms": line.intercept,
        "worst_deviation": line.worst_deviation,
    }


def _crossings(lines: dict[str, Line], families: dict[str, str], contexts: Sequence[float]) -> dict[str, Any]:
    """Of every compressed cache with every cache of transformers."""
    ours = [name for name in lines if families[name] == "kvcar"]
    return {
        name: {
            other: asdict(break_even(lines[name], lines[other], min(contexts), max(contexts)))
            for other in lines
            if families[other] != "kvcar"
        }
        for name in ours
    }


def prefill_figures(runners: Sequence[Runner], chunks: Sequence[tuple[int, int]], batch: int) -> dict[str, Any]:
    """Tokens per second over the whole prompt, and ratios to the full cache chunk by chunk."""
    full = next(runner for runner in runners if runner.name == FULL)
    tokens = batch * sum(count for _, count in chunks)
    rows = {
        runner.name: {
            "tokens_per_second": tokens / sum(runner.chunk_seconds),
            "time_ratio_to_full": ratios(runner.chunk_seconds, full.chunk_seconds).as_dict(),
            "time_ratio_of_sums": sum(runner.chunk_seconds) / sum(full.chunk_seconds),
            "chunk_seconds": [round(second, 4) for second in runner.chunk_seconds],
        }
        for runner in runners
    }
    return {"prefill": {"tokens": tokens, "chunks": [list(chunk) for chunk in chunks], "contenders": rows}}
