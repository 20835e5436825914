"""Compiles for an H100 what a call would launch there, with no GPU at hand: ``python gpu_compile.py``.

Launches are caught, their arguments' types taken, and the kernels compiled down to machine code. Prints a line for
each: name, shared memory in bytes, registers, bytes spilled. Run without TRITON_INTERPRET.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_TYPES = {
    torch.uint8: "*u8", torch.int32: "*i32", torch.int64: "*i64", torch.float32: "*fp32", torch.float16: "*fp16",
    torch.bfloat16: "*bf16", torch.bool: "*i1", int: "i32", float: "fp32",
}  # fmt: skip
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Caught:
    """Stands in for a jitted kernel."""

    def __init__(self, kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid):
        del grid

        def launch(*args, num_warps: int, num_stages: int = 3, **constants):
            names = self.kernel.arg_names
            signature = {}
            for name, value in zip(names, args, strict=False):
                signature[name] = _TYPES[value.dtype if isinstance(value, torch.Tensor) else type(value)]
            # As the launcher does: an argument of 1 is compiled in.
            ones = {name: 1 for name, value in zip(names, args, strict=False) if type(value) is int and value == 1}
            constants |= ones
            signature |= dict.fromkeys(constants, "constexpr")
            # As the launcher would find it: memory starts at multiples of 16 bytes.
            aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*")}
            source = ASTSource(self.kernel, signature, constexprs=constants, attrs=aligned)
            made = triton.compile(
                source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps, "num_stages": num_stages}
            )
            print(self.kernel.fn.__name__, made.metadata.shared, *_registers(made.asm["cubin"]), flush=True)

        return launch


def _registers(cubin: bytes) -> tuple[int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([_CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None, text
    return int(found[1]), int(found[2])


def attend_kernels(
    dtype: torch.dtype,
    heads_per_block: int,
    latents: int,
    rotary: bool,
    head_dim: int = 128,
    kv_heads: int = 2,
    query_heads: int = 8,
) -> None:
    """Kernels of one decoding step over blocks of ``latents`` latents, of 6, 5, 4 and 2 bits."""
    from kvcar.kernels.attend import triton as backend
    from kvcar.kernels.attend import triton_merge, triton_scores, triton_values
    from kvcar.kernels.attend.inputs import ExactPast, PagedPast, Reader
    from kvcar.kernels.layout import coded_segment
    from kvcar.kernels.rotary import RotaryTable
    from kvcar.plan import BitGroup

    for module, name in [
        (triton_scores, "decode_scores"),
        (triton_scores, "direct_scores"),
        (triton_values, "latent_sums"),
        (triton_merge, "exact_piece"),
        (triton_merge, "merge_pieces"),
    ]:
        kernel = getattr(module, name)
        setattr(module, name, kernel if isinstance(kernel, Caught) else Caught(kernel))
    backend.serves = lambda query, paged: None
    triton_scores.tile_tokens = triton_values.tile_tokens = lambda call, keys: 128 if call.half and not keys else 64
    groups = [BitGroup(bits=b, count=latents // 4) for b in (6, 5, 4, 2)]
    segment = coded_segment(groups, 64, 0)
    readers = tuple(
        Reader(segment, tuple(range(first, first + heads_per_block)), None, lambda u: u,
               (torch.randn(latents, heads_per_block * head_dim), torch.zeros(heads_per_block * head_dim)), False, dtype)
        for first in range(0, kv_heads, heads_per_block)
    )  # fmt: skip
    pages = torch.zeros(1, 40, -(-segment.size // 16) * 16, dtype=torch.uint8)
    table = RotaryTable(torch.ones(head_dim // 2, dtype=torch.float64), 1.0, "half") if rotary else None
    paged = PagedPast(
        [pages], 2500, torch.zeros(1, dtype=torch.int64), 0, torch.zeros(1, dtype=torch.int64), readers, readers, table
    )
    held = torch.zeros(1, kv_heads, 90, head_dim, dtype=dtype)
    exact = ExactPast(held, held, torch.ones(1, 1, 1, 90, dtype=torch.bool))
    backend.attend(torch.zeros(1, query_heads, 1, head_dim, dtype=dtype), exact, paged, 0.1, None)


def encode_kernel(width: int, latents: int) -> None:
    """The kernel that encodes pages into latents of 16 and 6 bits and fewer."""
    from kvcar.kernels.encode import AffineEncoder, Writer
    from kvcar.kernels.encode import triton as backend
    from kvcar.kernels.layout import coded_segment
    from kvcar.plan import BitGroup

    backend._kernel = Caught(backend._kernel)
    backend.serves = lambda x, writer: None
    segment = coded_segment([BitGroup(bits=b, count=latents // 5) for b in (16, 8, 6, 5, 2)], 64, 0)
    latents = segment.latents
    affine = AffineEncoder(torch.zeros(width, latents), torch.zeros(width), torch.ones(latents), torch.zeros(latents))
    backend.encode_pages(torch.zeros(1, 128, width), Writer(segment, None, None, affine, torch.float16))


if __name__ == "__main__":
    attend_kernels(torch.bfloat16, 2, 192, rotary=True)
    attend_kernels(torch.float32, 2, 192, rotary=False)
    encode_kernel(512, 400)
