"""Compiles for an H100 what a call would launch there, with no GPU at hand: ``python gpu_compile.py``.

Prints a line for each kernel: name, shared memory in bytes, registers, bytes spilled. Run without TRITON_INTERPRET,
with ``benchmarks/`` on the path.
"""

from __future__ import annotations

import torch
from speed.gpu_build import decode_step, encode_step

from kvcar.plan import BitGroup


def groups(*bits: int, latents: int) -> list[BitGroup]:
    """As many latents of each of these bits."""
    return [BitGroup(bits=b, count=latents // len(bits)) for b in bits]


def main() -> None:
    """Compile everything."""
    some = groups(6, 5, 4, 2, latents=192)
    shape = {"kv_heads": 2, "query_heads": 8, "tokens": 2500}
    launches = decode_step(torch.bfloat16, 2, some, some, rotary=True, **shape)
    launches += decode_step(torch.float32, 2, some, some, rotary=False, **shape)
    every = groups(8, 7, 6, 5, 4, 3, latents=72)
    launches += decode_step(torch.bfloat16, 1, every, every, **shape)
    launches += decode_step(torch.float32, 1, every, every, **shape)
    launches += decode_step(torch.bfloat16, 1, every, every, rounded=True, **shape)
    launches += decode_step(torch.bfloat16, 2, groups(8, 5, latents=192), some, rounded=True, **shape)
    launches += encode_step(512, groups(16, 8, 6, 5, 2, latents=400))
    for launch in launches:
        print(launch.name, launch.shared, *launch.registers_and_stack(), flush=True)


if __name__ == "__main__":
    main()
