"""Count the instructions of a decode step's kernels on an H100 in their machine code; no GPU has run them.

python benchmarks/gpu_instructions.py --name NAME

One layer and one sequence of 32,768 tokens at Llama-3.1-8B's shape, all in pages, bfloat16 queries. The kernels are
compiled for sm_90, disassembled, and every instruction is counted as often as it runs: the loop over blocks of latents
or tiles of tokens by its length, what a class of planes needs by the share of blocks that have it. The kernels at both
ends of a step, over the exact tokens and for merging, are left out: they do not grow with the sequence. Assumed:
instructions whose predicate is false cost an issue too; every warp of the grid runs to its end; latents' bits as in a
fit by the profile ``fast`` (shares of the demo model's), ``wide`` as a block of four heads might have. From these come
two times that no H100 can be faster than with this code: the schedulers', each issuing an instruction a cycle, and that
of the busiest unit. Waiting for memory, banks in conflict and barriers come on top.
"""

from __future__ import annotations

import json
from collections import Counter
from itertools import cycle
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from speed.gpu_build import PROCESSORS, Launch, decode_step, run_tool
from speed.sass import LANES, Code, code, parse

from kvcar.plan import BitGroup
from kvcar.record import Record

RESULTS = Path(__file__).parent / "results"
CLOCK_HZ = 1.755e9
SCHEDULERS = 4
TOKENS = 32_768
# Latents by bits of a block: heads, keys, values.
SHAPES: dict[str, tuple[int, dict[int, int], dict[int, int]]] = {
    "fast": (1, {8: 9, 7: 12, 6: 20, 5: 29, 4: 2}, {8: 7, 7: 18, 6: 26, 5: 25, 4: 24, 3: 2}),
    "wide": (4, {8: 14, 7: 30, 6: 80, 5: 140, 4: 110, 3: 35}, {8: 14, 7: 30, 6: 80, 5: 140, 4: 110, 3: 35}),
}


def main(
    name: Annotated[str, typer.Option(help="Of the record.")],
    output: Annotated[Path, typer.Option(help="Folder of the record.")] = RESULTS,
) -> None:
    """Compile, count and record."""
    shapes = {shape: counted(shape) for shape in SHAPES}
    config = {"name": name, "tokens": TOKENS, "clock_hz": CLOCK_HZ, "processors": PROCESSORS, "shapes": SHAPES}
    record = Record("gpu_instructions", {"shapes": shapes}, config)
    record.write(output / f"gpu-instructions-{name}.json")
    for shape, kernels in shapes.items():
        for each in kernels:
            print(shape, each["kernel"], json.dumps({k: v for k, v in each.items() if k != "kernel"}), flush=True)


def counted(shape: str) -> list[dict[str, Any]]:
    """Figures of the kernels that a layer of this shape launches."""
    heads, keys, values = SHAPES[shape]
    launches = decode_step(torch.bfloat16, heads, _groups(keys), _groups(values), tokens=TOKENS)
    return [_figures(launch) for launch in launches if "WIDTHS" in launch.arguments]


def _groups(counts: dict[int, int]) -> list[BitGroup]:
    return [BitGroup(bits=bits, count=count) for bits, count in counts.items()]


def _figures(launch: Launch) -> dict[str, Any]:
    found = code(parse(run_tool("nvdisasm", "-c", launch.cubin)))
    turns = _turns(launch, found.loops)
    executed = found.executed(turns, _shares(launch, found))
    warps = launch.grid[0] * launch.grid[1] * launch.grid[2] * launch.warps
    layer = {name: count * warps for name, count in executed.items()}
    registers, spilled = launch.registers_and_stack()
    return {
        "kernel": launch.name,
        "grid": launch.grid,
        "warps": launch.warps,
        "registers": registers,
        "spilled_bytes": spilled,
        "shared_bytes": launch.shared,
        "turns": turns,
        "instructions_of_a_warp": [
            {"in_loops": loops, "branch": branch, **_sorted(part)} for loops, branch, part in found.parts
        ],
        "warp_instructions": _sorted(layer),
        "warp_instructions_total": sum(layer.values()),
        "issue_us": 1e6 * sum(layer.values()) / (PROCESSORS * SCHEDULERS * CLOCK_HZ),
        "unit_us": {
            unit: 1e6 * layer.get(unit, 0) * 32 / (lanes * PROCESSORS * CLOCK_HZ) for unit, lanes in LANES.items()
        },
    }


def _turns(launch: Launch, loops: int) -> list[int]:
    """Turns of the kernel's loops: over tiles of tokens, then over blocks of latents where that is not unrolled."""
    return [launch.arguments[name] for name in ("TILES", "BLOCKS") if name in launch.arguments][:loops]


def _shares(launch: Launch, found: Code) -> list[float]:
    """Of the turns, how many take each branch: those of the blocks of latents that have planes of its width."""
    classes = [width for width in (8, 4, 2, 1) if launch.arguments["WIDTHS"] & width]
    widths = _widths(found, classes) if launch.arguments.get("WORDS") else classes
    unrolled = launch.arguments["BLOCKS"] if launch.arguments.get("KEEP") else 1
    present = launch.arguments["present"].view(-1, unrolled)
    own = len(widths) // unrolled
    return [float((present[:, i // own] & width != 0).float().mean()) for i, width in enumerate(widths)]


def _widths(found: Code, classes: list[int]) -> list[int]:
    """Width of the planes that each branch is for.

    The widest planes have one branch, the others one to load words and, later, one to unpack them. A branch with few
    loads may be none in machine code: its loads have predicates then, and count always. So branches that load are told
    by how many loads they have, and those that do not by their order.
    """
    loads = [0] * found.branches
    for _, branch, part in found.parts:
        if branch is not None:
            loads[branch] = part.get("global load and store", 0)
    unpacking = cycle(width for width in classes if width < 8)
    return [classes[0] * each // max(loads) if each else next(unpacking) for each in loads]


def _sorted(counts: Counter[str] | dict[str, float]) -> dict[str, float]:
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


if __name__ == "__main__":
    typer.run(main)
