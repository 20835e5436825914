"""Triton code that kernels over pages share: finding a token's page and unpacking a block of latents.

Imported by the Triton backends alone; needs the extra ``kvcar[triton]``.
"""
# pyright: basic, reportOperatorIssue=false, reportArgumentType=false
# ruff: noqa: SIM102 - the outer condition is known when compiling, the inner one is not.
# No "from __future__ import annotations": Triton reads the annotations of jitted functions.

import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction


def cannot_run_on(device_type: str) -> str | None:
    """Why kernels cannot run where tensors are, or None if they can."""
    # Triton's own functions were made when it was first imported, ours when this was; both must be interpreted.
    interpreted = isinstance(tl.sum, InterpretedFunction) and isinstance(unpack_block, InterpretedFunction)
    if device_type == "cuda" or interpreted:
        return None
    return (
        f"tensors are on {device_type}, and Triton compiles for cuda; TRITON_INTERPRET=1, set before Triton is first "
        "imported, interprets"
    )


@triton.jit
def page_address(pages, page_count, batch, token, seen, PAGE_TOKENS: tl.constexpr):
    """Addresses int64 ``[N]`` of the pages of tokens ``[N]``, from a table int64 ``[B, page_count]``."""
    return tl.load(pages + batch * page_count + token // PAGE_TOKENS, mask=seen, other=0)


@triton.jit
def _plane(address, inside, seen, table, latent, latents, KLASS: tl.constexpr, PAGE_TOKENS: tl.constexpr):
    """The bits int32 ``[N, BLOCK_R]`` that one plane width adds to the codes; class k is plane width 2**k."""
    BITS: tl.constexpr = 1 << KLASS
    ROWS: tl.constexpr = PAGE_TOKENS * BITS // 8
    field = table + KLASS * 3 * latents + latent
    offset = tl.load(field)
    stride = tl.load(field + latents)
    shift = tl.load(field + 2 * latents)
    place = inside // ROWS
    row = inside - place * ROWS
    where = address[:, None] + (offset[None, :] + row[:, None] * stride[None, :])
    there = seen[:, None] & (offset >= 0)[None, :]
    byte = tl.load(where.to(tl.pointer_type(tl.uint8)), mask=there, other=0).to(tl.int32)
    part = (byte >> (place * BITS)[:, None]) & ((1 << BITS) - 1)
    # A product, as it and the sum that follows are one instruction.
    return part * (1 << shift)[None, :]


@triton.jit
def _elements(address, inside, seen, table, latent, latents, ELEMENT: tl.constexpr):
    """Elements ``[N, BLOCK_R]`` stored as they are, in their dtype; 0 where a latent is none."""
    field = table + 4 * 3 * latents + latent
    offset = tl.load(field)
    stride = tl.load(field + latents)
    where = address[:, None] + (offset[None, :] + inside[:, None] * stride[None, :])
    there = seen[:, None] & (offset >= 0)[None, :]
    return tl.load(where.to(tl.pointer_type(ELEMENT)), mask=there, other=0.0)


@triton.jit
def unpack_block(
    address,
    inside,
    seen,
    table,
    present,
    block,
    latents,
    WIDTHS: tl.constexpr,
    ELEMENT: tl.constexpr,
    OPERAND: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Stored values ``[BLOCK_N, BLOCK_R]`` of one block of latents as OPERAND; 0 for tokens that are not seen.

    Args:
        address: int64 ``[BLOCK_N]`` of each token's page.
        inside: int32 ``[BLOCK_N]``, the token's place in its page.
        seen: bool ``[BLOCK_N]``; nothing is read for other tokens.
        table, present, latents: of the ``PlaneTable``.
        block: which block.
        WIDTHS: the table's widths; a block skips those it has not.
        ELEMENT: dtype of elements stored as they are.
    """
    latent = block * BLOCK_R + tl.arange(0, BLOCK_R)
    has = tl.load(present + block)
    code = tl.zeros([BLOCK_N, BLOCK_R], tl.int32)
    if WIDTHS & 8:
        if has & 8:
            code += _plane(address, inside, seen, table, latent, latents, 3, PAGE_TOKENS)
    if WIDTHS & 4:
        if has & 4:
            code += _plane(address, inside, seen, table, latent, latents, 2, PAGE_TOKENS)
    if WIDTHS & 2:
        if has & 2:
            code += _plane(address, inside, seen, table, latent, latents, 1, PAGE_TOKENS)
    if WIDTHS & 1:
        if has & 1:
            code += _plane(address, inside, seen, table, latent, latents, 0, PAGE_TOKENS)
    value = code.to(OPERAND)
    if WIDTHS & 16:
        if has & 16:
            value += _elements(address, inside, seen, table, latent, latents, ELEMENT).to(OPERAND)
    return value
