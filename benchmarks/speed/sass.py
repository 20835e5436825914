"""Machine code of a kernel (sm_90) as instructions by class, and how often each of them runs.

A kernel is a straight line with at most one loop that runs a known number of times; in the loop, a forward branch skips what a
class of planes needs where a block of latents has none. Whatever has another shape is refused rather than counted wrongly.
An instruction counts once for every warp that issues it, whether its predicate holds or not.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
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
    """Instructions by class, each once: outside the loop, in it whatever a block has, and what each class adds.

    Attributes:
        once: outside the loop.
        loop: in the loop, at every turn.
        branches: in the loop, in the order of the code: what the branches skip.
    """

    once: Counter[str]
    loop: Counter[str]
    branches: list[Counter[str]]

    def executed(self, turns: float, taken: Sequence[float]) -> dict[str, float]:
        """Instructions of a warp by class, for so many turns of the loop and the share of turns that take each branch."""
        counts: dict[str, float] = dict(self.once)
        parts = [(self.loop, turns), *zip(self.branches, (turns * share for share in taken), strict=True)]
        for part, times in parts:
            for name, count in part.items():
                counts[name] = counts.get(name, 0) + count * times
        return counts


def parse(text: str) -> list[Line]:
    """The instructions of ``nvdisasm -c``, up to the endless loop and padding behind the last exit."""
    lines: list[Line] = []
    label = None
    for row in text.splitlines():
        if found := _LABEL.match(row):
            label = found[1]
        elif found := _INSTRUCTION.match(row):
            target = _TARGET.search(found[2])
            lines.append(Line(found[1], label, target[1] if target else None))
            label = None
    last = max(index for index, line in enumerate(lines) if line.opcode == "EXIT")
    return lines[: last + 1]


def code(lines: Sequence[Line]) -> Code:
    """Split by the loop and its branches; ValueError where the shape is another."""
    at = {line.label: index for index, line in enumerate(lines) if line.label}
    jumps = [(index, at.get(line.target, len(lines))) for index, line in enumerate(lines) if line.target]
    back = [(target, index) for index, target in jumps if target <= index]
    if len(back) > 1:
        raise ValueError(f"{len(back)} loops; one at most can be counted")
    start, stop = back[0] if back else (0, -1)
    forward = [(index + 1, target) for index, target in jumps if index < target]
    if any(not start <= first < end <= stop for first, end in forward):
        raise ValueError("a branch outside the loop: how often it is taken is not known")
    if any(end > after for (_, end), (after, _) in zip(forward, forward[1:], strict=False)):
        raise ValueError("branches within branches: how often they are taken is not known")
    skipped = {index for first, end in forward for index in range(first, end)}
    inside = range(start, stop + 1)
    return Code(
        _classes(lines, [i for i in range(len(lines)) if i not in inside]),
        _classes(lines, [i for i in inside if i not in skipped]),
        [_classes(lines, range(first, end)) for first, end in forward],
    )


def _classes(lines: Sequence[Line], indices: Sequence[int]) -> Counter[str]:
    return Counter(_CLASS_OF.get(lines[index].opcode.split(".")[0], OTHER) for index in indices)
