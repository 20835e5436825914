"""Triton code that unpacks a block of latents of a tile of tokens, and finds a token's page.

Two ways: a byte or element at a time (``unpack_block``), and four latents at a time as 32-bit words (``unpack_words``),
for tiles of whole pages. A page's tokens are (s, rho): token ``s * step + rho`` with 8 values of ``s`` and ``step =
page_tokens / 8``. A plane of ``b`` bits has rows ``k * step + rho`` with ``b`` values of ``k``, and a row's byte has
the tokens whose ``s`` is ``k`` modulo ``b``. So whoever takes one ``rho`` and four latents reads every byte of theirs
once, ``b`` words a plane, for all 8 tokens.

Planes may start anywhere and rows follow each other without gaps, so the four bytes of a word lie in two aligned words.
Which, and how far to turn them, depends on the latents and ``rho`` alone, as ``step`` is a multiple of four rows.

Imported by the Triton backends alone; needs the extra ``kvcar[triton]``.
"""
# pyright: basic, reportOperatorIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# ruff: noqa: SIM102, RET505, SIM300 - conditions known when compiling stand for themselves, constants are upper case.
# No "from __future__ import annotations": Triton reads the annotations of jitted functions.

from functools import cache

import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

WORD_FIELDS = tl.constexpr(5)
FIELDS = tl.constexpr(4)
# Codes as float16 are their own bits, which as a number are this much smaller: exact, and no conversion.
HALF_SCALE = tl.constexpr(2.0**24)
_PRODUCT_SIZE = 16


def cannot_run_on(device_type: str) -> str | None:
    """Say why kernels cannot run where tensors are, or None if they can."""
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
    """Look up addresses int64 ``[N]`` of the pages of tokens ``[N]``, from a table int64 ``[B, page_count]``."""
    return tl.load(pages + batch * page_count + token // PAGE_TOKENS, mask=seen, other=0)


@triton.jit
def _plane(
    address, inside, seen, table, latent, latents, KLASS: tl.constexpr, PAGE_TOKENS: tl.constexpr, TRELLIS: tl.constexpr
):
    """Read the bits int32 ``[N, BLOCK_R]`` that one plane width adds to the codes; class k is plane width 2**k."""
    BITS: tl.constexpr = 1 << KLASS
    ROWS: tl.constexpr = PAGE_TOKENS * BITS // 8
    field = table + KLASS * FIELDS * latents + latent
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
    code = part * (1 << shift)[None, :]
    if TRELLIS:
        branches = there & (tl.load(field + 3 * latents) > 0)[None, :]
        one = _branch(address, inside - 1, branches, offset, stride, BITS, ROWS)
        three = _branch(address, inside - 3, branches, offset, stride, BITS, ROWS)
        code = (code ^ ((one ^ three) << 1)) + _branch(address, inside - 2, branches, offset, stride, BITS, ROWS)
    return code


@triton.jit
def _branch(address, inside, there, offset, stride, BITS: tl.constexpr, ROWS: tl.constexpr):
    """Read branches int32 ``[N, BLOCK_R]`` of the tokens ``inside`` a page; 0 before its first."""
    place = tl.maximum(inside, 0) // ROWS
    row = tl.maximum(inside, 0) - place * ROWS
    where = address[:, None] + (offset[None, :] + row[:, None] * stride[None, :])
    byte = tl.load(where.to(tl.pointer_type(tl.uint8)), mask=there & (inside >= 0)[:, None], other=0).to(tl.int32)
    return (byte >> (place * BITS)[:, None]) & 1


@triton.jit
def _elements(address, inside, seen, table, latent, latents, ELEMENT: tl.constexpr):
    """Read elements ``[N, BLOCK_R]`` stored as they are, in their dtype; 0 where a latent is none."""
    field = table + 4 * FIELDS * latents + latent
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
    """Unpack stored values ``[BLOCK_N, BLOCK_R]`` of one block of latents as OPERAND; 0 for tokens that are not seen.

    Args:
        address: int64 ``[BLOCK_N]`` of each token's page.
        inside: int32 ``[BLOCK_N]``, the token's place in its page.
        seen: bool ``[BLOCK_N]``; nothing is read for other tokens.
        table, present, latents: of the ``PlaneTable``.
        block: which block.
        WIDTHS: the table's widths, and 32 where any plane has branches; a block skips those it has not.
        ELEMENT: dtype of elements stored as they are.
    """
    latent = block * BLOCK_R + tl.arange(0, BLOCK_R)
    has = tl.load(present + block)
    code = tl.zeros([BLOCK_N, BLOCK_R], tl.int32)
    if WIDTHS & 8:
        if has & 8:
            code += _plane(address, inside, seen, table, latent, latents, 3, PAGE_TOKENS, WIDTHS & 32)
    if WIDTHS & 4:
        if has & 4:
            code += _plane(address, inside, seen, table, latent, latents, 2, PAGE_TOKENS, WIDTHS & 32)
    if WIDTHS & 2:
        if has & 2:
            code += _plane(address, inside, seen, table, latent, latents, 1, PAGE_TOKENS, WIDTHS & 32)
    if WIDTHS & 1:
        if has & 1:
            code += _plane(address, inside, seen, table, latent, latents, 0, PAGE_TOKENS, WIDTHS & 32)
    value = code.to(OPERAND)
    if WIDTHS & 16:
        if has & 16:
            value += _elements(address, inside, seen, table, latent, latents, ELEMENT).to(OPERAND)
    return value


@triton.jit
def code_scale(WORDS: tl.constexpr, OPERAND: tl.constexpr):
    """Return what unpacked values must be multiplied by."""
    return HALF_SCALE if WORDS and OPERAND == tl.float16 else 1.0


@triton.jit
def _turned(x, RIGHT: tl.constexpr):
    return (x >> RIGHT) | (x << (32 - RIGHT))


@triton.jit
def _place(table, word, words, rho, KLASS: tl.constexpr, STEP: tl.constexpr):
    """Find where words uint32 ``[W, I]`` of a class lie in any page.

    Offsets of both aligned words, bytes from a value of k to the next, which bytes are the first word's, how far to
    turn right, and the bits of the class.
    """
    field = table + KLASS * WORD_FIELDS * words + word
    offset, stride = tl.load(field), tl.load(field + words)
    shift, span, mask = tl.load(field + 2 * words), tl.load(field + 3 * words), tl.load(field + 4 * words)
    start = offset[:, None] + rho[None, :] * stride[:, None]
    off = (start & 3) * 8
    keep = tl.full(start.shape, 0xFFFFFFFF, tl.uint32) << off.to(tl.uint32)
    turn = ((off - shift[:, None]) & 31).to(tl.uint32)
    mask = tl.broadcast_to(mask[:, None], start.shape).to(tl.uint32, bitcast=True)
    return start & ~3, (start + span[:, None]) & ~3, STEP * stride[:, None], keep, turn, mask


@triton.jit
def _rows(address, place, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """Load both aligned words uint32 ``[W, I, 2, ...]`` of rows ``k * step + rho``, k from FIRST on.

    There is an axis for each binary digit of k, the lowest first.
    """
    first, second, step, _, _, _ = place
    if COUNT == 1:
        # In 64 bits, as sums of addresses then take the places of products and sums of offsets.
        down = step.to(tl.int64) * FIRST
        low = tl.load((address + first + down).to(tl.pointer_type(tl.uint32)))
        high = tl.load((address + second + down).to(tl.pointer_type(tl.uint32)))
        return low, high
    else:
        HALF: tl.constexpr = COUNT // 2
        low, high = _rows(address, place, FIRST, HALF)
        low_2, high_2 = _rows(address, place, FIRST + HALF, HALF)
        return tl.join(low, low_2), tl.join(high, high_2)


@triton.jit
def _nothing(address, BITS: tl.constexpr):
    """Give what ``_rows`` would, of zeros."""
    if BITS == 4:
        zero = tl.zeros([address.shape[0], address.shape[1], 2, 2], tl.uint32)
    elif BITS == 2:
        zero = tl.zeros([address.shape[0], address.shape[1], 2], tl.uint32)
    else:
        zero = tl.zeros([address.shape[0], address.shape[1]], tl.uint32)
    return zero, zero


@triton.jit
def _repeated(x, BITS: tl.constexpr):
    """Repeat ``[W, I]`` along an axis of two for each binary digit of a number below BITS."""
    if BITS >= 2:
        x = tl.join(x, x)
    if BITS >= 4:
        x = tl.join(x, x)
    if BITS >= 8:
        x = tl.join(x, x)
    return x


@triton.jit
def _class_bits(rows, place, BITS: tl.constexpr):
    """Compute what a class adds to codes uint32 ``[W, I, 2, 2, 2]``, four latents a word; axes are the digits of s."""
    low, high = rows
    _, _, _, keep, turn, mask = place
    keep, turn = _repeated(keep, BITS), _repeated(turn, BITS)
    x = (low & keep) | (high & (keep ^ 0xFFFFFFFF))
    x = (x >> turn) | (x << ((32 - turn) & 31))
    if BITS == 1:
        x = tl.join(x, _turned(x, 1))
    if BITS <= 2:
        x = tl.join(x, _turned(x, 2))
    if BITS <= 4:
        x = tl.join(x, _turned(x, 4))
    return x & _repeated(mask, 8)


@triton.jit
def _operand(code, has, OPERAND: tl.constexpr):
    """Turn codes uint32 ``[..., 2, 2, 2]`` into OPERAND ``[..., 2, 2, 2, 2, 2]``, by the byte's digits, high one first."""
    # ``has`` is below 256, which the compiler does not know: it would take the two bytes apart and put them together
    # again.
    bytes_of_halves = 0x00FF00FF + (has >> 8).to(tl.uint32)
    even, odd = code & bytes_of_halves, (code >> 8) & bytes_of_halves
    parts = tl.join(
        tl.join(even.to(tl.uint16), (even >> 16).to(tl.uint16)), tl.join(odd.to(tl.uint16), (odd >> 16).to(tl.uint16))
    )
    return parts.to(OPERAND, bitcast=True) if OPERAND == tl.float16 else parts.to(OPERAND)


@triton.jit
def word_places(
    table, block, latents, WIDTHS: tl.constexpr, PAGE_TOKENS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr
):
    """Find where a block's words lie in any page, for planes of 8, 4, 2 and 1 bits; 0 for a class that no block has."""
    STEP: tl.constexpr = PAGE_TOKENS // 8
    word = block * (BLOCK_R // 4) + tl.arange(0, BLOCK_R // 4)
    rho = tl.arange(0, BLOCK_N // 8) % STEP
    eight = _place(table, word, latents // 4, rho, 3, STEP) if WIDTHS & 8 else 0
    four = _place(table, word, latents // 4, rho, 2, STEP) if WIDTHS & 4 else 0
    two = _place(table, word, latents // 4, rho, 1, STEP) if WIDTHS & 2 else 0
    one = _place(table, word, latents // 4, rho, 0, STEP) if WIDTHS & 1 else 0
    return eight, four, two, one


@triton.jit
def unpack_words(
    address, places, has, WIDTHS: tl.constexpr, OPERAND: tl.constexpr, PAGE_TOKENS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Unpack codes ``[BLOCK_N, BLOCK_R]`` of a tile of whole pages as OPERAND, divided by ``code_scale``.

    Four latents of a word stand in the order 0, 2, 1, 3, as two of them in a register are then a mask away.

    Args:
        address: int64 ``[BLOCK_N / 8]`` of the page of each (page, rho); all are read.
        places: of ``word_places``.
        has: the sum of the widths that any latent of the block has; other classes are skipped.
    """
    STEP: tl.constexpr = PAGE_TOKENS // 8
    W: tl.constexpr = BLOCK_R // 4
    PAGES: tl.constexpr = BLOCK_N // PAGE_TOKENS
    address = tl.broadcast_to(address[None, :], [W, BLOCK_N // 8])
    # All loads come before what waits for any of them.
    if WIDTHS & 4:
        four = _nothing(address, 4)
        if has & 4:
            four = _rows(address, places[1], 0, 4)
    if WIDTHS & 2:
        two = _nothing(address, 2)
        if has & 2:
            two = _rows(address, places[2], 0, 2)
    if WIDTHS & 1:
        one = _nothing(address, 1)
        if has & 1:
            one = _rows(address, places[3], 0, 1)
    code = tl.zeros([W, BLOCK_N // 8, 2, 2, 2], tl.uint32)
    if WIDTHS & 8:
        if has & 8:
            code |= _class_bits(_rows(address, places[0], 0, 8), places[0], 8)
    if WIDTHS & 4:
        if has & 4:
            code |= _class_bits(four, places[1], 4)
    if WIDTHS & 2:
        if has & 2:
            code |= _class_bits(two, places[2], 2)
    if WIDTHS & 1:
        if has & 1:
            code |= _class_bits(one, places[3], 1)
    u = tl.reshape(_operand(code, has, OPERAND), [W, PAGES, STEP, 2, 2, 2, 2, 2])
    return tl.reshape(tl.permute(u, (1, 5, 4, 3, 2, 0, 7, 6)), [BLOCK_N, BLOCK_R])


@triton.jit
def _product(out, codes, ones, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    code = tl.load(codes + at).to(tl.uint16).to(tl.float16, bitcast=True)
    tl.store(out + at, tl.dot(code, tl.load(ones + at)))


@cache
def multiplies_subnormals(device: torch.device) -> bool:
    """Multiply every code by one on ``device`` and see; asked once for each device."""
    codes = torch.arange(_PRODUCT_SIZE * _PRODUCT_SIZE, dtype=torch.int32, device=device)
    one = torch.eye(_PRODUCT_SIZE, dtype=torch.float16, device=device)
    out = torch.empty(_PRODUCT_SIZE, _PRODUCT_SIZE, device=device, dtype=torch.float32)
    with torch.cuda.device_of(out):
        _product[(1,)](out, codes, one, SIZE=_PRODUCT_SIZE)
    return torch.equal(out.flatten() * 2.0**24, codes.float())
