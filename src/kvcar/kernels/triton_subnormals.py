"""Whether a GPU's matrix units multiply subnormal float16 numbers, as codes are (``triton_words.py``), or take them for zero."""
# pyright: basic, reportOperatorIssue=false, reportArgumentType=false
# No "from __future__ import annotations": Triton reads the annotations of jitted functions.

from functools import cache

import torch
import triton
import triton.language as tl

_SIZE = 16


@triton.jit
def _product(out, codes, ones, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    code = tl.load(codes + at).to(tl.uint16).to(tl.float16, bitcast=True)
    tl.store(out + at, tl.dot(code, tl.load(ones + at)))


@cache
def multiplies_subnormals(device: torch.device) -> bool:
    """Multiply every code by one on ``device`` and see; asked once for each device."""
    codes = torch.arange(_SIZE * _SIZE, dtype=torch.int32, device=device)
    one = torch.eye(_SIZE, dtype=torch.float16, device=device)
    out = torch.empty(_SIZE, _SIZE, device=device)
    with torch.cuda.device_of(out):
        _product[(1,)](out, codes, one, SIZE=_SIZE)
    return torch.equal(out.flatten() * 2.0**24, codes.float())
