"""Everything that a GPU must tell us, in one go of less than eight minutes: random weights, no download.

python benchmarks/gpu.py --name h100
python benchmarks/gpu.py --rehearse

Parts (``gpu_parts/``) run one after the other, each in a process of its own under a limit of time: where one fails, hangs or runs
out of memory, what it had found is kept, the reason is recorded, and the next one goes on. Each writes a record of its own, and
the run one of how the parts ended. A rehearsal runs everything at toy size on the CPU, under Triton's interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from gpu_parts import SECONDS, find

RESULTS = Path(__file__).parent / "results"
_SOURCES = Path(__file__).parents[1] / "src"
_INTERPRETED = {"TRITON_INTERPRET": "1", "KVCAR_KERNELS": "triton"}
_LAST_LINES = 12
_KILLED = 124
_REHEARSAL_SECONDS = 20
"""How much longer than a GPU the interpreter may take."""


def main(
    name: Annotated[str, typer.Option(help="Of the records: the device's, in a word.")] = "gpu",
    parts: Annotated[str | None, typer.Option(help="Some of the parts, with commas.")] = None,
    seconds: Annotated[float, typer.Option(help="For everything.")] = 480,
    rehearse: Annotated[bool, typer.Option(help="At toy size on the CPU.")] = False,
    output: Annotated[Path | None, typer.Option(help="Folder of the records; of a rehearsal a temporary one.")] = None,
    part: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Run the parts, or as a child one of them."""
    if rehearse:
        os.environ |= _INTERPRETED  # before Triton is first imported
    folder = output or (Path(tempfile.mkdtemp(prefix="kvcar-gpu-")) if rehearse else RESULTS)
    folder.mkdir(parents=True, exist_ok=True)
    if part is not None:
        run_part(part, name, rehearse, folder)
        return
    limits = _limits(parts, rehearse)
    ended = run_all(limits, name, sum(limits.values()) if rehearse else seconds, rehearse, folder)
    for each, outcome in ended.items():
        print(f"{each:<10} {outcome['ended']:<10} {outcome['seconds']:6.1f} s  {outcome['reason']}")
    print(f"records: {folder}")
    raise typer.Exit(0 if all(outcome["ended"] == "whole" for outcome in ended.values()) else 1)


def _limits(parts: str | None, rehearse: bool) -> dict[str, float]:
    """Seconds of the chosen parts."""
    chosen: Iterable[str] = SECONDS if parts is None else parts.split(",")
    if unknown := set(chosen) - set(SECONDS):
        raise typer.BadParameter(f"parts are {', '.join(SECONDS)}; got {', '.join(sorted(unknown))}")
    return {part: SECONDS[part] * (_REHEARSAL_SECONDS if rehearse else 1) for part in chosen}


def run_part(part: str, name: str, rehearse: bool, folder: Path) -> None:
    """Run one part here; its record is written anew whenever it has found out more."""
    own = find(part)
    import torch
    from speed.device import device_config

    from kvcar.record import Record

    if not rehearse and not torch.cuda.is_available():
        raise SystemExit("there is no GPU that PyTorch can use here; --rehearse runs everything at toy size on the CPU")
    device, began = torch.device("cpu" if rehearse else "cuda"), time.perf_counter()
    sizes = own.sizes(rehearse)
    config = {
        "name": name,
        "rehearsal": rehearse,
        "sizes": sizes,
        **device_config(device),
    }

    def write(figures: dict[str, Any], complete: bool) -> None:
        state = {"part": part, "complete": complete, "seconds": time.perf_counter() - began}
        Record("gpu", {**state, **figures}, config).write(record_of(folder, name, part))

    figures: dict[str, Any] = {}
    for figures in own.figures(device, sizes):
        write(figures, complete=False)
    write(figures, complete=True)


def record_of(folder: Path, name: str, part: str) -> Path:
    """Where a part's record goes."""
    return folder / f"gpu-{name}-{part}.json"


def run_all(
    limits: dict[str, float], name: str, seconds: float, rehearse: bool, folder: Path
) -> dict[str, dict[str, Any]]:
    """Run parts in processes of their own, each within its limit, until the time is over; how each ended."""
    until, ended = time.monotonic() + seconds, {}
    for part, limit in limits.items():
        record_of(folder, name, part).unlink(missing_ok=True)  # of an earlier run
        ended[part] = _outcome(part, name, min(until - time.monotonic(), limit), rehearse, folder)
        print(f"{part}: {ended[part]['ended']}, {ended[part]['seconds']:.1f} s", flush=True)
    from kvcar.record import Record  # now, as it takes seconds

    config = {"name": name, "rehearsal": rehearse, "seconds": seconds, "limits": limits}
    Record("gpu-run", {"parts": ended}, config).write(record_of(folder, name, "run"))
    return ended


def _outcome(part: str, name: str, seconds: float, rehearse: bool, folder: Path) -> dict[str, Any]:
    """How a part ended: whole; stopped or failed, with what it had found; or left out."""
    if seconds <= 0:
        return {"ended": "left out", "seconds": 0.0, "reason": "the time was over"}
    began = time.perf_counter()
    code, lines = _run(part, name, seconds, rehearse, folder)
    took, record = time.perf_counter() - began, record_of(folder, name, part)
    whole = code == 0 and record.exists() and json.loads(record.read_text(encoding="utf-8"))["complete"]
    reason = "" if whole else lines[-1].strip() if lines else f"exit status {code}"
    ended = "whole" if whole else "stopped" if code == _KILLED else "failed"
    return {"ended": ended, "seconds": took, "reason": reason, "last_lines": [] if whole else lines}


def _run(part: str, name: str, seconds: float, rehearse: bool, folder: Path) -> tuple[int, list[str]]:
    """Exit status and last lines of a child that gets so many seconds; what it started ends with it."""
    command = [sys.executable, __file__, "--part", part, "--name", name, "--output", str(folder)]
    path = os.pathsep.join(filter(None, [str(_SOURCES), os.environ.get("PYTHONPATH", "")]))
    log = folder / f"gpu-{name}-{part}.log"
    with log.open("w", encoding="utf-8") as out:
        child = subprocess.Popen(
            [*command, *(["--rehearse"] if rehearse else [])], stdout=out, stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": path}, start_new_session=True,
        )  # fmt: skip
        try:
            code = child.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, 9)
            child.wait()
            code = _KILLED
    text = log.read_text(encoding="utf-8", errors="replace")
    log.unlink()
    lines = text.splitlines()[-_LAST_LINES:]
    return code, [*lines, f"stopped after {seconds:.0f} s"] if code == _KILLED else lines


if __name__ == "__main__":
    typer.run(main)
