"""Machine code of a kernel (sm_90) as instructions by class, and how often each of them runs.

A kernel is a straight line with loops that run a known number of times; in a loop, a forward branch skips what a class
of planes needs where a block of latents has none. Ahead of the loops a branch may lead past a way out, for programs
that have nothing to do; it is taken here. Whatever has another shape is refused rather than counted wrongly. An
instruction counts once for every warp that issues it, whether its predicate holds or not.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from math import prod
from typing import NamedTuple

_LABEL = re.compile(r"^\.(L_x_\d+):")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)\b(.*);")
_TARGET = re.compile(r"`\(\.(L_x_\d+)\)")

# First part of the opcode -> class. Unlisted opcodes are "control and other".
_CLASSES = {
    "integer": "LOP3 SHF IADD3 PRMT ISETP SEL LEA VIADD IMNMX VIMNMX IABS SGXT BMSK PLOP3 P2R R2P MOV FMNMX FSETP FSEL LOP IADD "
    "VIADDMNMX I2FP F2FP",
    "integer multiply": "IMAD",
    "float": "FFMA FMUL FADD HADD2 HMUL2 HFMA2",
    "conversion": "I2F F2F F2I MUFU FLO POPC",
    "global load and store": "LDG STG LDGSTS ATOMG REDG",
    "shared load and store": "LDS STS LDSM STSM SHFL",
    "matrix": "HMMA HGMMA",
    "uniform": "ULOP3 USHF UIADD3 UIMAD ULEA USEL UISETP UMOV ULDC UPLOP3 R2UR S2UR UPRMT UP2UR UBMSK USGXT UFLO VOTEU REDUX",
}
_CLASS_OF = {opcode: name for name, opcodes in _CLASSES.items() for opcode in opcodes.split()}
OTHER = "control and other"
# Lanes a multiprocessor starts in a cycle, from the CUDA programming guide's table for compute capability 9.0.
LANES = {
    "integer": 64, "integer multiply": 64, "float": 128, "conversion": 16, "global load and store": 32,
    "shared load and store": 32,
}  # fmt: skip


class Line(NamedTuple):
    """One instruction: opcode, the label that stands before it or None, the label it jumps to or None."""

    opcode: str
    label: str | None
    target: str | None


class Code(NamedTuple):
    """Instructions by class, each once: by the loops they lie in, and what a branch in them skips.

    Attributes:
        loops: the number of loops, in the order of the code.
        parts: loops that instructions lie in, the branch that skips them or None, and their counts.
    """

    loops: int
    branches: int
    parts: list[tuple[tuple[int, ...], int | None, Counter[str]]]

    def executed(self, turns: Sequence[float], taken: Sequence[float]) -> dict[str, float]:
        """Instructions of a warp by class, for the turns of each loop and the share of turns that take each branch."""
        if len(turns) != self.loops or len(taken) != self.branches:
            raise ValueError(
                f"{self.loops} loops and {self.branches} branches, for {len(turns)} and {len(taken)} numbers"
            )
        counts: dict[str, float] = {}
        for loops, branch, part in self.parts:
            times = prod(turns[loop] for loop in loops) * (1 if branch is None else taken[branch])
            for name, count in part.items():
                counts[name] = counts.get(name, 0) + count * times
        return counts


def parse(text: str) -> list[Line]:
    """The instructions of ``nvdisasm -c``, up to the endless loop that stands behind every kernel."""
    lines: list[Line] = []
    label = None
    for row in text.splitlines():
        if found := _LABEL.match(row):
            label = found[1]
        elif found := _INSTRUCTION.match(row):
            target = _TARGET.search(found[2])
            lines.append(Line(found[1], label, target[1] if target else None))
            label = None
    return lines[
        : next(index for index, line in enumerate(lines) if line.target is not None and line.target == line.label)
    ]


def code(lines: Sequence[Line]) -> Code:
    """Split by loops and branches; ValueError where the shape is another."""
    at = {line.label: index for index, line in enumerate(lines) if line.label}
    jumps = [(index, at.get(line.target, len(lines))) for index, line in enumerate(lines) if line.target]
    loops = sorted((target, index + 1) for index, target in jumps if target <= index)
    forward = [(index + 1, target) for index, target in jumps if index < target]
    ways_out = [(first, end) for first, end in forward if lines[end - 1].opcode == "EXIT" and end <= loops[0][0]]
    branches = [branch for branch in forward if branch not in ways_out]
    if any(end > start for (_, end), (start, _) in pairwise(branches)):
        raise ValueError("branches within branches: how often they are taken is not known")
    if any(not any(start <= first < end <= stop for start, stop in loops) for first, end in branches):
        raise ValueError("a branch outside the loops: how often it is taken is not known")
    parts: dict[tuple[tuple[int, ...], int | None], Counter[str]] = {}
    for index, line in enumerate(lines):
        if any(start <= index < stop for start, stop in ways_out):
            continue
        around = tuple(i for i, (start, stop) in enumerate(loops) if start <= index < stop)
        skipped = next((i for i, (start, stop) in enumerate(branches) if start <= index < stop), None)
        name = _CLASS_OF.get(line.opcode.split(".")[0], OTHER)
        parts.setdefault((around, skipped), Counter())[name] += 1
    return Code(len(loops), len(branches), [(*key, counts) for key, counts in parts.items()])
