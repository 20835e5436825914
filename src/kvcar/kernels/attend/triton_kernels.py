"""The jitted kernels of attention over pages, which ``triton_paged.py`` launches.

Every kernel works on items: rows of a small int32 table that say which heads a program computes through which blocks of
latents. Query rows of a KV head are its query heads times the query tokens; rows of an item are those of its heads
one after the other.
"""
# pyright: basic, reportOperatorIssue=false, reportArgumentType=false
# ruff: noqa: RET505 - what is known when compiling is an if and an else, or an outer if.
# No "from __future__ import annotations": Triton reads the annotations of jitted functions.

import triton
import triton.language as tl

from ..triton_unpack import code_scale, page_address, unpack_block, unpack_words, word_places


@triton.jit
def softcapped(score, softcap, HAS_CAP: tl.constexpr):
    """``softcap * tanh(score / softcap)``, or the score itself."""
    if HAS_CAP:
        # tanh(x) = 1 - 2 / (exp(2 x) + 1), which is right at both ends too.
        score = softcap * (1.0 - 2.0 / (tl.exp(2.0 * score / softcap) + 1.0))
    return score


@triton.jit
def anchor_of(maximum):
    """What to subtract from scores: their maximum, or 0 where nothing was seen, so that weights are exp(-inf) = 0."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def _layer_row(heads, head_start, row, row_ok, batch, layer_heads, query_rows):
    """Find the row int64 ``[Q]`` of all heads' query rows that an item's own row is."""
    own = row // query_rows
    head = tl.load(heads + head_start + own, mask=row_ok, other=0)
    return (batch * layer_heads + head) * query_rows + (row - own * query_rows)


@triton.jit
def _store_scores(scores, score, layer_row, row_ok, token, seen, start, stop, softcap, HAS_CAP: tl.constexpr):
    """Write scores ``[Q, N]`` of tokens, softcapped, -inf for tokens that may not be seen."""
    score = tl.where(seen[None, :], softcapped(score, softcap, HAS_CAP), float("-inf"))
    where = scores + layer_row[:, None] * (stop - start) + (token - start)[None, :]
    tl.store(where, score, mask=row_ok[:, None] & (token < stop)[None, :])


@triton.jit
def _places(
    table, block, latents, WORDS: tl.constexpr, WIDTHS: tl.constexpr, PAGE_TOKENS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Find what ``_unpack`` needs of a block of latents whatever the tile of tokens."""
    return word_places(table, block, latents, WIDTHS, PAGE_TOKENS, BLOCK_N, BLOCK_R) if WORDS else 0


@triton.jit
def _unpack(
    pages, page_count, batch, begin, stop, seen, places, table, present, block, latents, WORDS: tl.constexpr,
    WIDTHS: tl.constexpr, ELEMENT: tl.constexpr, OPERAND: tl.constexpr, PAGE_TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Unpack stored values ``[BLOCK_N, BLOCK_R]`` of tokens from ``begin``, divided by ``code_scale``."""
    if WORDS:
        token = begin + tl.arange(0, BLOCK_N // 8) // (PAGE_TOKENS // 8) * PAGE_TOKENS
        # Pages behind the last are read as it: any codes do for tokens that are not seen.
        address = page_address(pages, page_count, batch, tl.minimum(token, stop - 1), token >= 0, PAGE_TOKENS)
        has = tl.load(present + block)
        return unpack_words(address, places, has, WIDTHS, OPERAND, PAGE_TOKENS, BLOCK_N, BLOCK_R)
    else:
        token = begin + tl.arange(0, BLOCK_N)
        address = page_address(pages, page_count, batch, token, seen, PAGE_TOKENS)
        return unpack_block(
            address, token % PAGE_TOKENS, seen, table, present, block, latents, WIDTHS, ELEMENT, OPERAND, PAGE_TOKENS,
            BLOCK_N, BLOCK_R,
        )  # fmt: skip


@triton.jit
def _split_pairs(keys):
    """Split pairs into first and second elements ``[N, P]``; columns ``[N, 2 P]`` are 8 first ones, 8 second ones, etc.

    In that order a thread of the matrix units holds both elements of a pair, where they must be for the next product.
    """
    N: tl.constexpr = keys.shape[0]
    P: tl.constexpr = keys.shape[1] // 2
    first, second = tl.split(tl.permute(tl.reshape(keys, [N, P // 8, 2, 8]), (0, 1, 3, 2)))
    return tl.reshape(first, [N, P]), tl.reshape(second, [N, P])


@triton.jit
def _angle(fine, coarse, coarse_rows, position, pair, PAIRS: tl.constexpr, FINE: tl.constexpr):
    """Compute cosines and sines float32 ``[P]`` of pairs at one position, by angle addition from two small tables."""
    # A tile may begin in the padding, at a negative position, though nothing is seen there.
    distance = tl.abs(position)
    at_coarse = coarse + (distance // FINE) * PAIRS + pair
    at_fine = fine + (distance % FINE) * PAIRS + pair
    cos_a, sin_a = tl.load(at_coarse), tl.load(at_coarse + coarse_rows * PAIRS)
    cos_b, sin_b = tl.load(at_fine), tl.load(at_fine + FINE * PAIRS)
    sin = sin_a * cos_b + cos_a * sin_b
    return cos_a * cos_b - sin_a * sin_b, tl.where(position < 0, -sin, sin)


@triton.jit
def _decoder_rows(part, exact_part, below, OPERAND: tl.constexpr, HAS_EXACT: tl.constexpr):
    """Load a block's rows of a decoder's matrix ``[BLOCK_R, COLUMNS]``, those in 8 bits and those that are not."""
    rows = tl.load(part + below).to(OPERAND)
    if HAS_EXACT:
        rows += tl.load(exact_part + below)
    return rows


@triton.jit
def _page_mean(address, offset, place, scale):
    """Read the mean errors float32 of some elements in the page at ``address``; see ``page_means.py``."""
    # Integers are added before they become a pointer, so that the page's address is one number.
    step = tl.load((address + offset).to(tl.pointer_type(tl.float16))).to(tl.float32)
    byte = tl.load((address + offset + 2 + place // 4).to(tl.pointer_type(tl.uint8))).to(tl.int32)
    return (((byte >> (2 * (place % 4))) & 3).to(tl.float32) - 1.5) * step * scale


@triton.jit
def _shown(shown, page_count, batch, token, seen, PAGE_TOKENS: tl.constexpr):
    """Which of the tokens that may be seen are read from their pages' codes; ``shown`` int64 ``[B, page_count]`` says how many."""
    count = tl.load(shown + batch * page_count + token // PAGE_TOKENS, mask=seen, other=0)
    return seen & (token % PAGE_TOKENS < count)


@triton.jit
def decode_scores(
    scores,
    pages,
    table,
    present,
    items,
    heads,
    matrix,
    bias,
    exact,
    unit,
    query,
    turns,
    fine,
    coarse,
    first,
    offset,
    shown,
    mean_offset,
    mean_place,
    mean_scale,
    start,
    stop,
    page_count,
    latents,
    query_rows: tl.constexpr,
    layer_heads,
    coarse_rows,
    softcap,
    HAS_CAP: tl.constexpr,
    HAS_SHOWN: tl.constexpr,
    HAS_MEANS: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    WORDS: tl.constexpr,
    WIDTHS: tl.constexpr,
    OPERAND: tl.constexpr,
    SCORED: tl.constexpr,
    PRECISION: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
    FINE: tl.constexpr,
    TILES: tl.constexpr,
    ROUNDED: tl.constexpr,
    EXACT_BLOCKS: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCKS: tl.constexpr,
    ROW_BLOCKS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """Score the tokens ``start`` to ``stop`` through keys that are decoded, rotated and thrown away.

    A program decodes the keys of TILES tiles of tokens for the heads of one item, once for all their query rows. The
    decoder's columns are the heads' rotated pairs, in the order of ``_split_pairs`` whatever the model's style, then
    what is not rotated; the query has its pairs' first elements, their second ones, and the rest. Heads stand side by
    side in the columns; a query row is zero outside its own head's.

    Args:
        scores: float32 ``[B, layer_heads * query_rows, stop - start]``, written.
        items: int32 ``[I, 4]``: first block of the table, first of ``heads``, their number, first block of rows of
            ``matrix``.
        matrix: OPERAND ``[rows, 2 * BLOCK_PAIRS + BLOCK_REST]``; int8 where ROUNDED.
        bias: float32 ``[I, 2 * BLOCK_PAIRS + BLOCK_REST]``.
        exact: OPERAND ``[I * EXACT_BLOCKS * BLOCK_R, 2 * BLOCK_PAIRS + BLOCK_REST]``, rows of latents that have none in 8
            bits, which ``matrix`` has zeros for; read where ROUNDED.
        unit: float32 ``[I, 2 * BLOCK_PAIRS + BLOCK_REST]`` that both are in; read where ROUNDED.
        query: float32 ``[B, layer_heads, query_rows, 2 * PAIRS + REST]``, scaled, columns as above.
        turns: float32 ``[2, FINE, PAIRS]``, ``fine`` times ``code_scale``.
        fine, coarse: float32 ``[2, FINE or coarse_rows, PAIRS]`` cosines and sines.
        SCORED: dtype of decoded keys and queries in their product.
        first, offset: int64 ``[B]``.
        shown: int64 ``[B, page_count]``, where HAS_SHOWN: tokens of each page that are attended.
        mean_offset: int32 ``[I]``, where HAS_MEANS: bytes into the page where the mean errors of an item's unit lie.
        mean_place, mean_scale: int32 and float32 ``[I, 2 * BLOCK_PAIRS + BLOCK_REST]``, where HAS_MEANS: which of them is added
            to a column, and its scale, 0 for none.
    """
    item = items + tl.program_id(1) * 4
    block_start, head_start = tl.load(item), tl.load(item + 1)
    head_count, matrix_block = tl.load(item + 2), tl.load(item + 3)
    batch = tl.program_id(2).to(tl.int64)
    first_token, first_position = tl.load(first + batch).to(tl.int32), tl.load(offset + batch).to(tl.int32)

    COLUMNS: tl.constexpr = 2 * BLOCK_PAIRS + BLOCK_REST
    SCALE: tl.constexpr = code_scale(WORDS, OPERAND)
    column = tl.arange(0, 2 * BLOCK_PAIRS)
    rest_column = tl.arange(0, BLOCK_REST if REST else 16)
    own_bias = bias + tl.program_id(1) * COLUMNS
    pair_bias = tl.load(own_bias + column) / SCALE
    rest_bias = tl.load(own_bias + 2 * BLOCK_PAIRS + rest_column) / SCALE if REST else 0.0
    part = matrix + (matrix_block * BLOCK_R + tl.arange(0, BLOCK_R))[:, None] * COLUMNS
    part_rest = part + 2 * BLOCK_PAIRS + rest_column[None, :]
    part += column[None, :]
    exact_part, exact_rest = exact, exact
    if ROUNDED:
        exact_part = exact + (tl.program_id(1) * EXACT_BLOCKS * BLOCK_R + tl.arange(0, BLOCK_R))[:, None] * COLUMNS
        exact_rest = exact_part + 2 * BLOCK_PAIRS + rest_column[None, :]
        exact_part += column[None, :]
        pair_unit = tl.load(unit + tl.program_id(1) * COLUMNS + column)
        rest_unit = tl.load(unit + tl.program_id(1) * COLUMNS + 2 * BLOCK_PAIRS + rest_column) if REST else 0.0
    if HAS_MEANS:
        at_means = tl.load(mean_offset + tl.program_id(1))
        own_means = tl.program_id(1) * COLUMNS
        pair_place, pair_scale = tl.load(mean_place + own_means + column), tl.load(mean_scale + own_means + column)
        own_means += 2 * BLOCK_PAIRS
        rest_place = tl.load(mean_place + own_means + rest_column) if REST else 0
        rest_scale = tl.load(mean_scale + own_means + rest_column) if REST else 0.0
    pair_column = tl.arange(0, BLOCK_PAIRS)
    pair = pair_column % PAIRS
    kept, kept_rest, kept_places = (), (), ()
    if KEEP:
        # A matrix of few blocks stays in shared memory for all tiles.
        for block in tl.static_range(BLOCKS):
            places = _places(table, block_start + block, latents, WORDS, WIDTHS, PAGE_TOKENS, BLOCK_N, BLOCK_R)
            kept_places = kept_places + (places,)  # noqa: RUF005 - as Triton adds tuples
            below = block * BLOCK_R * COLUMNS
            kept = kept + (_decoder_rows(part, exact_part, below, OPERAND, block < EXACT_BLOCKS),)  # noqa: RUF005
            if REST:
                rows = _decoder_rows(part_rest, exact_rest, below, OPERAND, block < EXACT_BLOCKS)
                kept_rest = kept_rest + (rows,)  # noqa: RUF005

    for tile in range(TILES):
        begin = start + (tl.program_id(0) * TILES + tile) * BLOCK_N
        token = begin + tl.arange(0, BLOCK_N)
        seen = (token >= first_token) & (token < stop)
        if HAS_SHOWN:
            seen = _shown(shown, page_count, batch, token, seen, PAGE_TOKENS)
        keys = tl.zeros([BLOCK_N, 2 * BLOCK_PAIRS], tl.float32)
        if not ROUNDED:
            keys += pair_bias[None, :]
        if REST:
            rest = tl.zeros([BLOCK_N, BLOCK_REST], tl.float32)
            if not ROUNDED:
                rest += rest_bias[None, :]
        if KEEP:
            for block in tl.static_range(BLOCKS):
                u = _unpack(
                    pages, page_count, batch, begin, stop, seen, kept_places[block], table, present, block_start + block, latents,
                    WORDS, WIDTHS, tl.float16, OPERAND, PAGE_TOKENS, BLOCK_N, BLOCK_R,
                )  # fmt: skip
                keys = tl.dot(u, kept[block], keys, input_precision=PRECISION)
                if REST:
                    rest = tl.dot(u, kept_rest[block], rest, input_precision=PRECISION)
        else:
            for block in tl.static_range(EXACT_BLOCKS):
                places = _places(table, block_start + block, latents, WORDS, WIDTHS, PAGE_TOKENS, BLOCK_N, BLOCK_R)
                u = _unpack(
                    pages, page_count, batch, begin, stop, seen, places, table, present, block_start + block, latents,
                    WORDS, WIDTHS, tl.float16, OPERAND, PAGE_TOKENS, BLOCK_N, BLOCK_R,
                )  # fmt: skip
                below = block * BLOCK_R * COLUMNS
                keys = tl.dot(u, _decoder_rows(part, exact_part, below, OPERAND, True), keys, input_precision=PRECISION)
                if REST:
                    rows = _decoder_rows(part_rest, exact_rest, below, OPERAND, True)
                    rest = tl.dot(u, rows, rest, input_precision=PRECISION)
            for block in range(EXACT_BLOCKS, BLOCKS):
                places = _places(table, block_start + block, latents, WORDS, WIDTHS, PAGE_TOKENS, BLOCK_N, BLOCK_R)
                u = _unpack(
                    pages, page_count, batch, begin, stop, seen, places, table, present, block_start + block, latents,
                    WORDS, WIDTHS, tl.float16, OPERAND, PAGE_TOKENS, BLOCK_N, BLOCK_R,
                )  # fmt: skip
                below = block * BLOCK_R * COLUMNS
                keys = tl.dot(u, _decoder_rows(part, part, below, OPERAND, False), keys, input_precision=PRECISION)
                if REST:
                    rows = _decoder_rows(part_rest, part_rest, below, OPERAND, False)
                    rest = tl.dot(u, rows, rest, input_precision=PRECISION)
        if ROUNDED:
            keys = keys * pair_unit[None, :] + pair_bias[None, :]
            if REST:
                rest = rest * rest_unit[None, :] + rest_bias[None, :]
        if HAS_MEANS:
            # All tokens of a tile are of one page.
            address = tl.load(pages + batch * page_count + tl.minimum(begin, stop - 1) // PAGE_TOKENS)
            keys += (_page_mean(address, at_means, pair_place, pair_scale) / SCALE)[None, :]
            if REST:
                rest += (_page_mean(address, at_means, rest_place, rest_scale) / SCALE)[None, :]

        # Keys turn by their place in the tile alone, and queries back by the position of its first token.
        at = turns + tl.arange(0, BLOCK_N)[:, None] * PAIRS + pair[None, :]
        cos, sin = tl.load(at), tl.load(at + FINE * PAIRS)
        one, two = _split_pairs(keys)
        turned_one = (one * cos - two * sin).to(SCORED)
        turned_two = (two * cos + one * sin).to(SCORED)
        # Tiles behind the last token are not in the tables, nor seen.
        position = tl.minimum(begin, stop - 1) - first_position
        back_cos, back_sin = _angle(fine, coarse, coarse_rows, position, pair, PAIRS, FINE)

        for row_block in range(ROW_BLOCKS):
            row = row_block * BLOCK_Q + tl.arange(0, BLOCK_Q)
            row_ok = row < head_count * query_rows
            layer_row = _layer_row(heads, head_start, row, row_ok, batch, layer_heads, query_rows)
            own = row // query_rows
            mine = row_ok[:, None] & (own[:, None] == (pair_column // PAIRS)[None, :])
            q = query + layer_row[:, None] * (2 * PAIRS + REST)
            q_one = tl.load(q + pair[None, :], mask=mine, other=0.0)
            q_two = tl.load(q + PAIRS + pair[None, :], mask=mine, other=0.0)
            back_one = (q_one * back_cos[None, :] + q_two * back_sin[None, :]).to(SCORED)
            back_two = (q_two * back_cos[None, :] - q_one * back_sin[None, :]).to(SCORED)
            score = tl.dot(turned_one, tl.trans(back_one), input_precision=PRECISION)
            score = tl.dot(turned_two, tl.trans(back_two), score, input_precision=PRECISION)
            if REST:
                mine = row_ok[:, None] & (own[:, None] == (rest_column // REST)[None, :])
                q_rest = tl.load(q + 2 * PAIRS + (rest_column % REST)[None, :], mask=mine, other=0.0)
                key_rest = (rest * SCALE).to(SCORED)
                score = tl.dot(key_rest, tl.trans(q_rest.to(SCORED)), score, input_precision=PRECISION)
            _store_scores(
                scores, tl.trans(score), layer_row, row_ok, token, seen, start, stop, softcap, HAS_CAP
            )  # fmt: skip


@triton.jit
def direct_scores(
    scores,
    pages,
    table,
    present,
    items,
    heads,
    operand,
    constant,
    of_means,
    first,
    shown,
    start,
    stop,
    page_count,
    latents,
    query_rows,
    layer_heads,
    operand_size,
    softcap,
    HAS_CAP: tl.constexpr,
    HAS_SHOWN: tl.constexpr,
    HAS_MEANS: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    WORDS: tl.constexpr,
    WIDTHS: tl.constexpr,
    ELEMENT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """Score the tokens ``start`` to ``stop`` by products of stored values with queries in their space.

    Args:
        scores: float32 ``[B, layer_heads * query_rows, stop - start]``, written.
        items: int32 ``[I, 5]``: first block of the table, first of ``heads``, their number, first row, the
            group's queries in ``operand``.
        operand: float32 ``[B, operand_size]``: for each group ``[rows, BLOCKS * BLOCK_R]``.
        constant: float32 ``[B, layer_heads * query_rows]``, added to the scores.
        of_means: float32 ``[B, layer_heads * query_rows, page_count]``, where HAS_MEANS: what each page's mean error adds.
    """
    item = items + tl.program_id(1) * 5
    block_start, head_start, head_count = tl.load(item), tl.load(item + 1), tl.load(item + 2)
    batch = tl.program_id(2).to(tl.int64)
    begin = start + tl.program_id(0) * BLOCK_N
    token = begin + tl.arange(0, BLOCK_N)
    seen = (token >= tl.load(first + batch)) & (token < stop)
    if HAS_SHOWN:
        seen = _shown(shown, page_count, batch, token, seen, PAGE_TOKENS)
    row = tl.load(item + 3) + tl.arange(0, BLOCK_Q)
    row_ok = row < head_count * query_rows
    layer_row = _layer_row(heads, head_start, row, row_ok, batch, layer_heads, query_rows)

    q = operand + batch * operand_size + tl.load(item + 4) + row[:, None] * (BLOCKS * BLOCK_R)
    score = tl.zeros([BLOCK_Q, BLOCK_N], tl.float32)
    for block in range(BLOCKS):
        places = _places(table, block_start + block, latents, WORDS, WIDTHS, PAGE_TOKENS, BLOCK_N, BLOCK_R)
        u = _unpack(
            pages, page_count, batch, begin, stop, seen, places, table, present, block_start + block, latents,
            WORDS, WIDTHS, ELEMENT, tl.float32, PAGE_TOKENS, BLOCK_N, BLOCK_R,
        )  # fmt: skip
        latent = block * BLOCK_R + tl.arange(0, BLOCK_R)
        q_block = tl.load(q + latent[None, :], mask=row_ok[:, None], other=0.0)
        score = tl.dot(q_block, tl.trans(u), score, input_precision=PRECISION)
    score += tl.load(constant + layer_row, mask=row_ok, other=0.0)[:, None]
    if HAS_MEANS:
        at = layer_row[:, None] * page_count + (token // PAGE_TOKENS)[None, :]
        score += tl.load(of_means + at, mask=row_ok[:, None] & seen[None, :], other=0.0)
    _store_scores(scores, score, layer_row, row_ok, token, seen, start, stop, softcap, HAS_CAP)


@triton.jit
def latent_sums(
    sums,
    stats,
    scores,
    pages,
    table,
    present,
    items,
    heads,
    first,
    start,
    stop,
    split_start,
    splits,
    page_count,
    latents,
    query_rows,
    layer_heads,
    PAGE_TOKENS: tl.constexpr,
    WORDS: tl.constexpr,
    WIDTHS: tl.constexpr,
    ELEMENT: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """Sum stored values under the softmax of one split's scores, with an online softmax over its tiles.

    Args:
        sums: float32 ``[B, splits, I, BLOCK_Q, BLOCK_R]``, written: weights are ``exp(score - maximum)``.
        stats: float32 ``[2, B, splits, I, BLOCK_Q]``, written: the split's maximum and its sum of weights.
        scores: float32 ``[B, layer_heads * query_rows, stop - start]``.
        items: int32 ``[I, 4]``: block of the table, first of ``heads``, their number, first row.
        start, stop: tokens that ``scores`` has; the first is the first of split ``split_start``.
    """
    item = items + tl.program_id(1) * 4
    block, head_start, head_count = tl.load(item), tl.load(item + 1), tl.load(item + 2)
    batch = tl.program_id(2).to(tl.int64)
    row = tl.load(item + 3) + tl.arange(0, BLOCK_Q)
    row_ok = row < head_count * query_rows
    layer_row = _layer_row(heads, head_start, row, row_ok, batch, layer_heads, query_rows)
    first_token = tl.load(first + batch).to(tl.int32)

    maximum = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    # By column of the tile, so that threads need to meet once only.
    mass = tl.zeros([BLOCK_Q, BLOCK_N], tl.float32)
    total = tl.zeros([BLOCK_R, BLOCK_Q], tl.float32)
    begin = start + tl.program_id(0) * (TILES * BLOCK_N)
    place = (batch * splits + split_start + tl.program_id(0)) * tl.num_programs(1) + tl.program_id(1)
    own = place * BLOCK_Q + tl.arange(0, BLOCK_Q)
    masses = stats + tl.num_programs(2).to(tl.int64) * splits * tl.num_programs(1) * BLOCK_Q
    own_sums = sums + own[:, None] * BLOCK_R + tl.arange(0, BLOCK_R)[None, :]
    places = _places(table, block, latents, WORDS, WIDTHS, PAGE_TOKENS, BLOCK_N, BLOCK_R)
    for tile in range(TILES):
        token = begin + tile * BLOCK_N + tl.arange(0, BLOCK_N)
        seen = (token >= first_token) & (token < stop)
        score = tl.load(
            scores + layer_row[:, None] * (stop - start) + (token - start)[None, :],
            mask=row_ok[:, None] & seen[None, :],
            other=float("-inf"),
        )
        higher = tl.maximum(maximum, tl.max(score, 1))
        anchor = anchor_of(higher)
        rescale = tl.exp(maximum - anchor)
        weight = tl.exp(score - anchor[:, None])
        mass = mass * rescale[:, None] + weight
        maximum = higher
        u = _unpack(
            pages, page_count, batch, begin + tile * BLOCK_N, stop, seen, places, table, present, block, latents,
            WORDS, WIDTHS, ELEMENT, OPERAND, PAGE_TOKENS, BLOCK_N, BLOCK_R,
        )  # fmt: skip
        total = tl.dot(tl.trans(u), tl.trans(weight.to(OPERAND)), total * rescale[None, :], input_precision=PRECISION)

    tl.store(stats + own, maximum)
    tl.store(masses + own, tl.sum(mass, 1))
    tl.store(own_sums, tl.trans(total) * code_scale(WORDS, OPERAND))


@triton.jit
def mean_sums(
    sums,
    maxima,
    scores,
    pages,
    heads,
    mean_offset,
    mean_place,
    mean_scale,
    start,
    stop,
    split_start,
    splits,
    page_count,
    count,
    query_rows,
    layer_heads,
    PAGE_TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """Sum the mean errors of the pages' values under the softmax of one split's scores, as ``latent_sums`` does their codes.

    Args:
        sums: float32 ``[B, splits, layer_heads, query_rows, HEAD_DIM]``, written for ``heads``: weights are
            ``exp(score - maximum)``.
        maxima: float32 ``[B, splits, layer_heads, query_rows]``, written.
        scores, start, stop, split_start: as of ``latent_sums``.
        heads: int32 ``[count]``.
        mean_offset, mean_place, mean_scale: int32 ``[count]``, int32 and float32 ``[count, HEAD_DIM]``; see ``decode_scores``.
    """
    entry = tl.program_id(1) % count
    head = tl.load(heads + entry)
    batch = tl.program_id(2).to(tl.int64)
    row = tl.program_id(1) // count * BLOCK_Q + tl.arange(0, BLOCK_Q)
    row_ok = row < query_rows
    column = tl.arange(0, BLOCK_D)
    column_ok = column < HEAD_DIM
    at_means = tl.load(mean_offset + entry)
    place = tl.load(mean_place + entry * HEAD_DIM + column, mask=column_ok, other=0)
    scale = tl.load(mean_scale + entry * HEAD_DIM + column, mask=column_ok, other=0.0)
    layer_row = (batch * layer_heads + head) * query_rows + row

    maximum = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    begin = start + tl.program_id(0) * (TILES * BLOCK_N)
    for tile in range(TILES):
        first = begin + tile * BLOCK_N
        token = first + tl.arange(0, BLOCK_N)
        score = tl.load(
            scores + layer_row[:, None] * (stop - start) + (token - start)[None, :],
            mask=row_ok[:, None] & (token < stop)[None, :],
            other=float("-inf"),
        )
        higher = tl.maximum(maximum, tl.max(score, 1))
        anchor = anchor_of(higher)
        mass = tl.sum(tl.exp(score - anchor[:, None]), 1)
        # All tokens of a tile are of one page; behind the last one nothing has mass.
        address = tl.load(pages + batch * page_count + tl.minimum(first, stop - 1) // PAGE_TOKENS)
        mean = _page_mean(address, at_means, place, scale)
        total = total * tl.exp(maximum - anchor)[:, None] + mass[:, None] * mean[None, :]
        maximum = higher
    own = ((batch * splits + split_start + tl.program_id(0)) * layer_heads + head) * query_rows + row
    tl.store(maxima + own, maximum, mask=row_ok)
    tl.store(sums + own[:, None] * HEAD_DIM + column[None, :], total, mask=row_ok[:, None] & column_ok[None, :])
