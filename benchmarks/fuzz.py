"""Many bundles and contexts, changed at random: each ends in an error of kvcar or works, in bounded time and memory.

python benchmarks/fuzz.py --bundles 60000 --contexts 60000

Cases run in a process of their own, with limits on memory and time; one that dies or hangs is a fault too.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

RESULTS = Path(__file__).parent / "results"
# Seconds of the processor for a case, and on the clock before a process counts as hanging: other work may go first.
MEMORY_BYTES, SECONDS, DEAD_SECONDS = 1 << 30, 10, 600
_CASES_PER_PROCESS, _CASES_PER_LINE = 20_000, 2500


@dataclass
class Tally:
    """What came of the cases of one kind."""

    cases: int = 0
    works: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    faults: list[dict[str, Any]] = field(default_factory=list)
    slowest: tuple[float, int] = (0.0, -1)
    growth_bytes: int = 0

    def add(self, seed: int, outcome: dict[str, Any]) -> None:
        """Count one."""
        self.cases += 1
        self.growth_bytes = max(self.growth_bytes, outcome.get("growth_bytes", 0))
        self.slowest = max(self.slowest, (outcome.get("seconds", 0.0), seed))
        if "fault" in outcome:
            self.faults.append({"seed": seed, "fault": outcome["fault"]})
        elif "refused" in outcome:
            self.refused[outcome["refused"]] += 1
        else:
            self.works += 1

    def figures(self) -> dict[str, Any]:
        """As they stand in the record."""
        return {
            "cases": self.cases, "works": self.works, "refused": dict(self.refused), "faults": self.faults,
            "slowest_seconds": self.slowest[0], "slowest_seed": self.slowest[1], "largest_growth_bytes": self.growth_bytes,
        }  # fmt: skip


def run_cases(kind: str, seeds: list[int], folder: str, pipe: Any) -> None:
    """Run cases in this process, which is a child's: says which begins, and what came of it."""
    import torch
    from fuzz_cases import CASES, make_corpus

    torch.set_num_threads(1)
    corpus, scratch = make_corpus(Path(folder)), Path(tempfile.mkdtemp(dir=folder, prefix="scratch-"))
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + MEMORY_BYTES, in_use + MEMORY_BYTES))
    signal.signal(signal.SIGPROF, _too_slow)
    for seed in seeds:
        pipe.send((seed, None))
        pipe.send((seed, _outcome(lambda seed=seed: CASES[kind](corpus, random.Random(f"{kind} {seed}"), scratch))))
    pipe.send((None, None))


class TooSlowError(BaseException):
    """A case that takes too long; nothing that catches exceptions should catch it."""


def _too_slow(*_: object) -> None:
    raise TooSlowError(f"more than {SECONDS} s")


def _outcome(case: Any) -> dict[str, Any]:
    from kvcar.errors import KVCarError

    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        case()
        found: dict[str, Any] = {}
    except KVCarError as error:
        found = (
            {"refused": type(error).__name__}
            if 0 < len(str(error)) < 2000
            else {"fault": f"a message of {len(str(error))}"}
        )
    except BaseException as error:
        found = {"fault": f"{type(error).__name__}: {error}"[:300]}
    signal.setitimer(signal.ITIMER_PROF, 0)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    return found | {"seconds": round(time.process_time() - started, 3), "growth_bytes": grown}


def outcomes(kind: str, seeds: list[int], folder: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Run cases in a child and yield what came of each; of one that kills the child or never ends too."""
    context = multiprocessing.get_context("spawn")
    while seeds:
        own, other = context.Pipe(duplex=False)
        child = context.Process(target=run_cases, args=(kind, seeds, folder, other), daemon=True)
        child.start()
        other.close()
        current, why = None, None
        while why is None:
            try:
                if not own.poll(DEAD_SECONDS * (1 if current is not None else 10)):
                    child.kill()
                    why = f"nothing after {DEAD_SECONDS} s"
                    break
                seed, outcome = own.recv()
            except EOFError:
                child.join()
                why = f"the process ended with {child.exitcode}"
                break
            if seed is None:
                child.join()
                return
            current = seed
            if outcome is not None:
                yield seed, outcome
                seeds, current = seeds[seeds.index(seed) + 1 :], None
        if current is None:
            raise RuntimeError(f"no case was running, and {why}")
        yield current, {"fault": why}
        seeds = seeds[seeds.index(current) + 1 :]


def main(
    bundles: int = 60_000,
    contexts: int = 60_000,
    first_seed: int = 0,
    name: str = "fuzz",
    output: Annotated[Path, typer.Option(help="Folder of the record.")] = RESULTS,
    corpus: Annotated[Path | None, typer.Option(help="Folder to keep the files in that cases begin with.")] = None,
) -> None:
    """Run cases of seeds ``first_seed`` and up of both kinds, and write the record."""
    started, tallies = time.perf_counter(), {"bundle": Tally(), "context": Tally()}
    config = {"first_seed": first_seed, "limit_seconds": SECONDS, "limit_memory_bytes": MEMORY_BYTES}
    output.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = corpus or Path(temporary)
        folder.mkdir(exist_ok=True)
        for kind, count in (("bundle", bundles), ("context", contexts)):
            tally = tallies[kind]
            for start in range(first_seed, first_seed + count, _CASES_PER_PROCESS):
                seeds = list(range(start, min(start + _CASES_PER_PROCESS, first_seed + count)))
                for seed, outcome in outcomes(kind, seeds, str(folder)):
                    tally.add(seed, outcome)
                    if "fault" in outcome:
                        print(f"{kind} {seed}: {outcome['fault']}", flush=True)
                    if tally.cases % _CASES_PER_LINE and tally.cases < count:
                        continue
                    print(f"{kind}: {tally.cases} cases, {tally.works} work, {len(tally.faults)} faults", flush=True)
                    # Of what was run so far, so that a run may be ended early.
                    minutes = (time.perf_counter() - started) / 60
                    write_record(output / f"{name}.json", tallies, minutes, config)
    if any(tally.faults for tally in tallies.values()):
        raise typer.Exit(1)


def write_record(path: Path, tallies: dict[str, Tally], minutes: float, config: dict[str, Any]) -> None:
    """Write what came of the cases so far; seeds of a kind are ``first_seed`` and those after it."""
    from kvcar.record import Record

    figures = {kind: tally.figures() for kind, tally in tallies.items() if tally.cases}
    Record("fuzz", figures | {"minutes": minutes}, config).write(path)


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    typer.run(main)
