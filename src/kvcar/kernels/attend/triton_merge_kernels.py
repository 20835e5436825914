"""The jitted kernels at both ends of a step: attention to the tokens kept exactly, and all pieces merged and decoded.

``triton.py`` launches them.
"""
# pyright: basic, reportOperatorIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# No "from __future__ import annotations": Triton reads the annotations of jitted functions.

import triton
import triton.language as tl

from .triton_kernels import anchor_of, softcapped


@triton.jit
def exact_piece(
    maximum_out,
    mass_out,
    total_out,
    query,
    keys,
    values,
    mask,
    key_batch,
    key_head,
    key_token,
    value_batch,
    value_head,
    value_token,
    mask_batch,
    mask_row,
    tokens,
    query_rows,
    query_tokens,
    softcap,
    HAS_CAP: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """Attend to the tokens kept exactly, not yet normalised.

    Args:
        maximum_out, mass_out: float32 ``[B, H, query_rows]``, written: maximum of the scores, sum of ``exp(score -
            maximum)``.
        total_out: float32 ``[B, H, query_rows, HEAD_DIM]``, written: values under these weights.
        query: float32 ``[B, H, query_rows, HEAD_DIM]``, scaled; row ``r`` is of query token ``r % query_tokens``.
        keys, values: ``[B, H, tokens, HEAD_DIM]`` of any float dtype, with strides of batch, head and token.
        mask: bool ``[B, query_tokens, tokens]`` with strides of batch and row, true where a query may attend.
    """
    head, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    row = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    row_ok = row < query_rows
    column = tl.arange(0, BLOCK_D)
    column_ok = column < HEAD_DIM
    own = (batch * tl.num_programs(0) + head) * query_rows + row
    at = own[:, None] * HEAD_DIM + column[None, :]
    inside = row_ok[:, None] & column_ok[None, :]
    q = tl.load(query + at, mask=inside, other=0.0)
    maximum = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK_Q], tl.float32)
    total = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    start = 0
    while start < tokens:
        token = start + tl.arange(0, BLOCK_N)
        there = (token < tokens)[:, None] & column_ok[None, :]
        key_at = keys + batch * key_batch + head * key_head + token[:, None] * key_token + column[None, :]
        key = tl.load(key_at, mask=there, other=0.0).to(tl.float32)
        score = tl.dot(q, tl.trans(key), input_precision=PRECISION)
        score = softcapped(score, softcap, HAS_CAP)
        may = row_ok[:, None] & (token < tokens)[None, :]
        if HAS_MASK:
            mask_at = mask + batch * mask_batch + (row % query_tokens)[:, None] * mask_row + token[None, :]
            may = may & (tl.load(mask_at, mask=may, other=0) != 0)
        score = tl.where(may, score, float("-inf"))
        higher = tl.maximum(maximum, tl.max(score, 1))
        rescale = tl.exp(maximum - anchor_of(higher))
        weight = tl.exp(score - anchor_of(higher)[:, None])
        mass = mass * rescale + tl.sum(weight, 1)
        maximum = higher
        value_at = values + batch * value_batch + head * value_head + token[:, None] * value_token + column[None, :]
        value = tl.load(value_at, mask=there, other=0.0).to(tl.float32)
        total = tl.dot(weight, value, total * rescale[:, None], input_precision=PRECISION)
        start += BLOCK_N
    tl.store(maximum_out + own, maximum, mask=row_ok)
    tl.store(mass_out + own, mass, mask=row_ok)
    tl.store(total_out + at, total, mask=inside)


@triton.jit
def _splits_from(start, splits, split_stride, split_place, row_ok, SPLITS: tl.constexpr):
    """Find places int64 ``[SPLITS, ROWS]`` of rows in splits from ``start`` on, and which of them are there."""
    split = start + tl.arange(0, SPLITS)
    place = split.to(tl.int64)[:, None] * split_stride + split_place[None, :]
    return place, (split < splits)[:, None] & row_ok[None, :]


@triton.jit
def _split_sums(
    sums, stats, split_place, split_stride, splits, row_ok, anchor, column, column_ok,
    SPLITS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Add up ``[ROWS, COLUMNS]`` of some columns of a block of latents over all splits, under one anchor."""
    out = tl.zeros([ROWS, COLUMNS], tl.float32)
    start = 0
    while start < splits:
        place, ok = _splits_from(start, splits, split_stride, split_place, row_ok, SPLITS)
        weight = tl.exp(tl.load(stats + place, mask=ok, other=float("-inf")) - anchor[None, :])
        at = place[:, :, None] * BLOCK_R + column[None, None, :]
        part = tl.load(sums + at, mask=ok[:, :, None] & column_ok[None, None, :], other=0.0)
        out += tl.sum(part * weight[:, :, None], 0)
        start += SPLITS
    return out


@triton.jit
def _rounded_rows(decoder, latent, step, column, column_ok, EXACT: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Read rows float32 ``[R, COLUMNS]`` of a head's decoder where it lies in 8 bits, zeros for no latent."""
    codes = tl.load(decoder).to(tl.pointer_type(tl.int8))
    exact = tl.load(decoder + 1).to(tl.pointer_type(EXACT))
    rounded = latent - tl.load(decoder + 3)
    at = (rounded // 4 * (4 * HEAD_DIM) + rounded % 4)[:, None] + column[None, :] * 4
    in8 = tl.load(codes + at, mask=(rounded >= 0)[:, None] & column_ok[None, :], other=0).to(tl.float32)
    at = latent[:, None] * tl.load(decoder + 4) + column[None, :]
    whole = ((latent >= 0) & (rounded < 0))[:, None] & column_ok[None, :]
    return in8 * step[None, :] + tl.load(exact + at, mask=whole, other=0.0).to(tl.float32)


@triton.jit
def merge_pieces(
    out,
    sums,
    stats,
    exact_maximum,
    exact_mass,
    exact_total,
    heads,
    matrix,
    bias,
    decoders,
    latent_of,
    mean_sums,
    mean_maxima,
    splits,
    items,
    query_rows,
    layer_heads,
    mass_offset,
    CODED: tl.constexpr,
    HAS_MEANS: tl.constexpr,
    ROUNDED: tl.constexpr,
    EXACT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ITEM_ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Merge splits with the exact piece, decode the sums of latents: the output of some columns of one head.

    Args:
        out: ``[B, layer_heads, query_rows, HEAD_DIM]`` of any float dtype, written.
        sums: float32 ``[B, splits, items, ITEM_ROWS, BLOCK_R]``; stats: float32 ``[2, B, splits, items, ITEM_ROWS]``,
            maxima and, ``mass_offset`` further on, masses: both of ``latent_sums``.
        exact_maximum, exact_mass, exact_total: of ``exact_piece``.
        heads: int32 ``[N, 5]``: head of the layer, first item of its group, blocks of latents of the group, its place
            in the group, first row of ``matrix``, or of ``latent_of``.
        matrix: float32 ``[rows, HEAD_DIM]``: each head's columns of its group's decoder. Without CODED latents are
            elements of the head. Not read where ROUNDED.
        bias: float32 ``[N, HEAD_DIM]``.
        decoders: int64 ``[N, 5]``, where ROUNDED, of each head: addresses of its decoder int8 ``[groups, HEAD_DIM, 4]``, of the
            rows of dtype EXACT of the latents before those, and of the steps float32 ``[HEAD_DIM]`` of the former; how many rows
            of EXACT there are, and elements from one to the next.
        mean_sums, mean_maxima: float32 ``[B, splits, layer_heads, query_rows, HEAD_DIM]`` and without the last, where HAS_MEANS:
            of ``mean_sums``.
        latent_of: int32 ``[rows]``, where ROUNDED: the latent of each slot, -1 for none.
    """
    entry = heads + tl.program_id(0) * 5
    head, first_item, blocks = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    batch = tl.program_id(2).to(tl.int64)
    row_blocks = (query_rows + ROWS - 1) // ROWS
    row = (tl.program_id(1) % row_blocks) * ROWS + tl.arange(0, ROWS)
    row_ok = row < query_rows
    column = (tl.program_id(1) // row_blocks) * COLUMNS + tl.arange(0, COLUMNS)
    column_ok = column < HEAD_DIM
    # Rows of a group's heads follow each other, in items of ITEM_ROWS rows, each with all blocks of latents.
    group_row = tl.load(entry + 3) * query_rows + row
    item = first_item + group_row // ITEM_ROWS * blocks
    split_stride = items * ITEM_ROWS
    split_place = batch * splits * split_stride + item * ITEM_ROWS + group_row % ITEM_ROWS

    own = (batch * layer_heads + head) * query_rows + row
    exact = tl.load(exact_maximum + own, mask=row_ok, other=float("-inf"))
    maximum = exact
    start = 0
    while start < splits:
        place, ok = _splits_from(start, splits, split_stride, split_place, row_ok, SPLITS)
        maximum = tl.maximum(maximum, tl.max(tl.load(stats + place, mask=ok, other=float("-inf")), 0))
        start += SPLITS
    anchor = anchor_of(maximum)
    mass = tl.zeros([ROWS], tl.float32)
    start = 0
    while start < splits:
        place, ok = _splits_from(start, splits, split_stride, split_place, row_ok, SPLITS)
        weight = tl.exp(tl.load(stats + place, mask=ok, other=float("-inf")) - anchor[None, :])
        mass += tl.sum(tl.load(stats + mass_offset + place, mask=ok, other=0.0) * weight, 0)
        start += SPLITS

    if CODED:
        total = mass[:, None] * tl.load(bias + tl.program_id(0) * HEAD_DIM + column, mask=column_ok, other=0.0)[None, :]
        latent = tl.arange(0, BLOCK_R)
        if ROUNDED:
            own_decoder = decoders + tl.program_id(0) * 5
            step = tl.load(tl.load(own_decoder + 2).to(tl.pointer_type(tl.float32)) + column, mask=column_ok, other=0.0)
        block = 0
        while block < blocks:
            u = _split_sums(
                sums, stats, split_place + block * ITEM_ROWS, split_stride, splits, row_ok, anchor, latent, latent >= 0,
                SPLITS, ROWS, BLOCK_R, BLOCK_R,
            )  # fmt: skip
            slot = tl.load(entry + 4) + block * BLOCK_R + latent
            if ROUNDED:
                part = _rounded_rows(own_decoder, tl.load(latent_of + slot), step, column, column_ok, EXACT, HEAD_DIM)
            else:
                at = slot[:, None] * HEAD_DIM + column[None, :]
                part = tl.load(matrix + at, mask=column_ok[None, :], other=0.0)
            # Few rows: products of floats, where matrix units would want 16 of them and round.
            total += tl.sum(u[:, :, None] * part[None, :, :], 1)
            block += 1
        if HAS_MEANS:
            all_rows = layer_heads * query_rows
            total += _split_sums(
                mean_sums, mean_maxima, batch * splits * all_rows + head * query_rows + row, all_rows, splits, row_ok, anchor, column,
                column_ok, SPLITS, ROWS, COLUMNS, HEAD_DIM,
            )  # fmt: skip
    else:
        block = (tl.program_id(1) // row_blocks) * COLUMNS // BLOCK_R
        total = _split_sums(
            sums, stats, split_place + block * ITEM_ROWS, split_stride, splits, row_ok, anchor, column - block * BLOCK_R,
            column_ok, SPLITS, ROWS, COLUMNS, BLOCK_R,
        )  # fmt: skip

    at = own[:, None] * HEAD_DIM + column[None, :]
    inside = row_ok[:, None] & column_ok[None, :]
    weight = tl.exp(exact - anchor)
    mass += tl.load(exact_mass + own, mask=row_ok, other=0.0) * weight
    total += tl.load(exact_total + at, mask=inside, other=0.0) * weight[:, None]
    # A row that saw nothing gives 0.
    result = total / tl.where(mass > 0.0, mass, 1.0)[:, None]
    tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)
