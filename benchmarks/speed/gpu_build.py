"""Kernels of a call, compiled for an H100 (sm_90) down to machine code where there is no GPU.

Launches are caught, their arguments' types taken as the launcher would take them, and the kernels compiled. Needs
Triton; runs without TRITON_INTERPRET alone. Functions replace what the kernels' modules launch, for the rest of the
process.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvcar.codecs.linear8 import GROUP_LATENTS
from kvcar.kernels.attend import RoundedDecoder
from kvcar.kernels.plane_table import highest_codes, segment_fields
from kvcar.layout import SegmentLayout
from kvcar.plan import BitGroup

_TOP = 255

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
PROCESSORS = 132
_TYPES = {
    torch.uint8: "*u8", torch.int8: "*i8", torch.int32: "*i32", torch.int64: "*i64", torch.float32: "*fp32", torch.float16: "*fp16",
    torch.bfloat16: "*bf16", torch.bool: "*i1", int: "i32", float: "fp32",
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """What would have been launched.

    Attributes:
        name: of the kernel.
        grid: programs.
        warps: of a program.
        arguments: by name, constants included.
        cubin: machine code.
        shared: bytes of shared memory of a program.
    """

    name: str
    grid: tuple[int, ...]
    warps: int
    arguments: dict[str, Any]
    cubin: bytes
    shared: int

    def registers_and_stack(self) -> tuple[int, int]:
        """Registers of a thread, and bytes that it spills."""
        text = run_tool("cuobjdump", "-res-usage", self.cubin)
        found = re.search(r"REG:(\d+) STACK:(\d+)", text)
        assert found is not None, text
        return int(found[1]), int(found[2])


class Caught:
    """Stands in for a jitted kernel; adds what is launched to ``launches``."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]):
        def launch(
            *args: Any, num_warps: int, num_stages: int = 3, maxnreg: int | None = None, **constants: Any
        ) -> None:
            options = {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": maxnreg}
            made = triton.compile(self._source(args, constants), target=GPUTarget("cuda", 90, 32), options=options)
            arguments = dict(zip(self.kernel.arg_names, args, strict=False)) | constants
            cubin, shared = made.asm["cubin"], made.metadata.shared
            self.launches.append(Launch(self.kernel.fn.__name__, grid, num_warps, arguments, cubin, shared))

        return launch

    def _source(self, args: tuple[Any, ...], constants: dict[str, Any]) -> ASTSource:
        names = self.kernel.arg_names
        by_name = dict(zip(names, args, strict=False))
        constants = constants | {
            p.name: by_name.pop(p.name) for p in self.kernel.params if p.is_constexpr and p.name in by_name
        }
        given = list(by_name.items())
        signature = {
            name: _TYPES[value.dtype if isinstance(value, torch.Tensor) else type(value)] for name, value in given
        }
        # As the launcher does: an argument of 1 is compiled in.
        constants = constants | {name: 1 for name, value in given if type(value) is int and value == 1}
        signature |= dict.fromkeys(constants, "constexpr")
        # As the launcher would find it: memory starts at multiples of 16 bytes.
        aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*")}
        return ASTSource(self.kernel, signature, constexprs=constants, attrs=aligned)


def run_tool(tool: str, option: str, cubin: bytes) -> str:
    """Output of one of the tools for machine code that Triton brings along."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([TOOLS / tool, option, file.name], capture_output=True, text=True, check=True).stdout


def decode_step(
    dtype: torch.dtype,
    heads_per_block: int,
    keys: Sequence[BitGroup],
    values: Sequence[BitGroup],
    *,
    rotary: bool = True,
    rounded: bool = False,
    head_dim: int = 128,
    kv_heads: int = 8,
    query_heads: int = 32,
    tokens: int = 32_768,
) -> list[Launch]:
    """Launches of one layer's decoding step of one sequence on an H100; codes of random blocks, nothing is computed."""
    from kvcar.kernels.attend import triton as backend
    from kvcar.kernels.attend import triton_paged
    from kvcar.kernels.attend.inputs import ExactPast, PagedPast, Reader
    from kvcar.kernels.page_means import PageMeans
    from kvcar.kernels.rotary import RotaryTable
    from kvcar.layout import MeansLayout, aligned, coded_segment

    launches: list[Launch] = []
    for module, name in [
        (triton_paged, "decode_scores"),
        (triton_paged, "direct_scores"),
        (triton_paged, "latent_sums"),
        (triton_paged, "mean_sums"),
        (backend, "exact_piece"),
        (backend, "merge_pieces"),
    ]:
        kernel = getattr(module, name)
        setattr(module, name, Caught(kernel.kernel if isinstance(kernel, Caught) else kernel, launches))
    backend.unsupported = lambda *_: None
    triton_paged.tile_tokens = triton_paged.gpu_tile_tokens
    triton_paged.programs = lambda _: PROCESSORS * triton_paged.PROGRAMS_PER_PROCESSOR
    readers, end = [], 0
    for groups in (keys, values):
        for first in range(0, kv_heads, heads_per_block):
            segment = coded_segment(groups, 64, aligned(end))
            end, width = segment.end, heads_per_block * head_dim
            means = PageMeans(MeansLayout(end, width), slice(0, width), torch.ones(width)) if rounded else None
            end = end if means is None else means.layout.end
            heads = tuple(range(first, first + heads_per_block))
            decoder = _random_decoder(segment, heads_per_block, head_dim) if rounded else None
            affine = None if rounded else (torch.randn(segment.latents, width), torch.zeros(width))
            readers.append(Reader(segment, heads, None, lambda u: u, affine, False, dtype, decoder, means))
    half = len(readers) // 2
    pages = torch.zeros(1, -(-tokens // 64), aligned(end), dtype=torch.uint8)
    zero = torch.zeros(1, dtype=torch.int64)
    table = RotaryTable(torch.ones(head_dim // 2, dtype=torch.float64), 1.0, "half") if rotary else None
    shown = torch.full(pages.shape[:2], 64) if rounded else None
    paged = PagedPast([pages], tokens, zero, 0, zero, tuple(readers[:half]), tuple(readers[half:]), table, shown)
    window = torch.zeros(1, kv_heads, 132, head_dim, dtype=dtype)
    exact = ExactPast(window, window, torch.ones(1, 1, 1, 132, dtype=torch.bool))
    backend.attend(torch.zeros(1, query_heads, 1, head_dim, dtype=dtype), exact, paged, 0.1, None)
    return launches


def _random_decoder(segment: SegmentLayout, heads: int, head_dim: int) -> RoundedDecoder:
    """A decoder in 8 bits, but for latents of 8 bits."""
    exact = int((highest_codes(segment_fields(segment)) == _TOP).sum())
    groups = -(-(segment.latents - exact) // GROUP_LATENTS)
    decoder = torch.randint(-127, 128, (heads, groups, head_dim, GROUP_LATENTS), dtype=torch.int8)
    width = heads * head_dim
    whole = torch.randn(exact, width, dtype=torch.float16)
    return RoundedDecoder(whole, decoder, torch.full((width,), 0.01), torch.zeros(width))


def encode_step(width: int, groups: Sequence[BitGroup]) -> list[Launch]:
    """The launches that encode two pages of a block, by one matrix and from latents."""
    from kvcar.kernels.encode import AffineEncoder, Writer
    from kvcar.kernels.encode import triton as backend
    from kvcar.layout import coded_segment

    launches: list[Launch] = []
    for name in ("encode_block", "quantize_block"):
        kernel = getattr(backend, name)
        setattr(backend, name, Caught(kernel.kernel if isinstance(kernel, Caught) else kernel, launches))
    backend.unsupported = lambda *_: None
    segment = coded_segment(groups, 64, 0)
    latents = segment.latents
    affine = AffineEncoder(torch.zeros(width, latents), torch.zeros(width), torch.ones(latents), torch.zeros(latents))
    x = torch.zeros(1, 128, width)
    backend.encode_pages(x, Writer(segment, None, None, affine, torch.float16))
    steps = affine.scale, affine.zero
    backend.encode_pages(x, Writer(segment, lambda x: x @ affine.matrix, None, None, torch.float16, steps))
    return launches
