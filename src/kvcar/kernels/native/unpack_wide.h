/* Packed planes of a page to codes with AVX-512: a token's codes are put together in a register, from all planes, and
 * stored once. A masked load puts a plane's bytes where its latents are, and reads nothing else. */
#ifndef KVCAR_UNPACK_WIDE_H
#define KVCAR_UNPACK_WIDE_H

#include <immintrin.h>
#include <stdint.h>

#define WIDE 64 /* latents in a vector */
#define WIDE_PLANES_LIMIT 16
#define WIDE_BRANCH_ROWS 56 /* of all planes with branches: a page of 64 tokens has 8, 16 and 32 of them */

/* What a plane adds to a vector of latents of some tokens: `first` is where the page's first token would be if the
 * plane began with the first of these latents, `from` the same of the first of these tokens. */
typedef struct {
    const uint8_t *first, *from;
    long step;
    int bits, shift;
    __mmask64 lanes;
    __m512i turn, keep;
} WidePart;

/* Ones in the lanes of latents `start` to `stop`, counted from the vector's first. */
static inline __mmask64 lanes_between(int start, int stop)
{
    start = start < 0 ? 0 : start;
    stop = stop > WIDE ? WIDE : stop;
    if (start >= stop)
        return 0;
    return (stop == WIDE ? ~0ull : (1ull << stop) - 1) & ~((1ull << start) - 1);
}

/* Some tokens of an eighth of the page. Turning whole words moves a byte's bits to where they belong; what came from
 * its neighbours is masked off. */
static inline __attribute__((always_inline)) void unpack_eighth(
    const int n, const WidePart *parts, const int tokens, uint8_t *out, const int stride, const int is_half)
{
    for (int t = 0; t < tokens; t++, out += stride) {
        __m512i codes = _mm512_setzero_si512();
        for (int p = 0; p < n; p++) {
            const __m512i bytes = _mm512_maskz_loadu_epi8(parts[p].lanes, parts[p].from + t * parts[p].step);
            /* 0xEA: (first and second) or third */
            codes = _mm512_ternarylogic_epi32(_mm512_rorv_epi32(bytes, parts[p].turn), parts[p].keep, codes, 0xEA);
        }
        if (is_half)
            _mm256_storeu_si256((__m256i *)out, _mm512_castsi512_si256(codes));
        else
            _mm512_storeu_si512(out, codes);
    }
}

static inline __attribute__((always_inline)) void unpack_eighth_of(
    const int n, const WidePart *parts, const int tokens, uint8_t *out, const int stride, const int is_half)
{
    /* Known counts, so that masks and what is turned by stay in registers. */
    switch (n) {
    case 1: unpack_eighth(1, parts, tokens, out, stride, is_half); break;
    case 2: unpack_eighth(2, parts, tokens, out, stride, is_half); break;
    case 3: unpack_eighth(3, parts, tokens, out, stride, is_half); break;
    case 4: unpack_eighth(4, parts, tokens, out, stride, is_half); break;
    case 5: unpack_eighth(5, parts, tokens, out, stride, is_half); break;
    default: unpack_eighth(n, parts, tokens, out, stride, is_half); break;
    }
}

/* What branches come to; a vector each of a row's latents. */
typedef struct {
    __m512i levels[WIDE_BRANCH_ROWS], halves[WIDE_BRANCH_ROWS];
} WideBranches;

/* Whether the branches of all planes have room. */
static inline int has_wide_room(const Plane *planes, int n)
{
    int rows = 0;
    for (int p = 0; p < n; p++)
        rows += planes[p].trellis ? planes[p].rows : 0;
    return n <= WIDE_PLANES_LIMIT && rows <= WIDE_BRANCH_ROWS;
}

/* `follow_branches` for the lanes of a vector: rows as they go on the way to tokens, the branches' own bits in the levels'. */
static inline void follow_wide(const Plane *plane, const WidePart *part, __m512i *levels, __m512i *halves)
{
    const int rows = plane->rows, bits = plane->bits;
    const __m512i mask = _mm512_set1_epi8(bits == 1 ? -1 : bits == 2 ? 0x55 : 0x11);
    __m512i back[3];
    for (int row = 0; row < 3; row++) {
        const __m512i last = _mm512_maskz_loadu_epi8(part->lanes, part->first + (long)(rows - 1 - row) * part->step);
        /* Of the highest places nothing is left: what a word's byte gives to the next one is masked off. */
        const __m512i up = _mm512_slli_epi32(_mm512_and_si512(last, mask), (unsigned)bits);
        back[row] = _mm512_and_si512(up, _mm512_set1_epi8((char)(0xff << bits)));
    }
    for (int row = 0; row < rows; row++) {
        const __m512i own = _mm512_maskz_loadu_epi8(part->lanes, part->first + (long)row * part->step);
        levels[row] = _mm512_ternarylogic_epi32(own, back[0], back[2], 0x96); /* all three, exclusive or */
        halves[row] = back[1];
        back[2] = back[1], back[1] = back[0], back[0] = _mm512_and_si512(own, mask);
    }
}

/* What each plane adds to latents `first` to `first` + WIDE; how many add something. */
static int wide_parts(const uint8_t *data, const Plane *planes, int n, int first, WidePart *parts, WideBranches *branches)
{
    int found = 0, row = 0;
    for (int p = 0; p < n; p++) {
        const Plane *plane = planes + p;
        WidePart *part = parts + found;
        part->lanes = lanes_between(plane->start - first, plane->start + plane->count - first);
        if (!part->lanes)
            continue;
        part->first = data + plane->offset + first - plane->start;
        part->step = plane->count;
        part->bits = plane->bits;
        part->shift = plane->shift;
        part->keep = _mm512_set1_epi8((char)(((1u << plane->bits) - 1) << plane->shift));
        found++;
        if (plane->trellis) {
            follow_wide(plane, part, branches->levels + row, branches->halves + row);
            part->first = (const uint8_t *)(branches->levels + row);
            part->step = WIDE;
            part[1] = part[0];
            part[1].first = (const uint8_t *)(branches->halves + row);
            part[1].shift = 0;
            part[1].keep = _mm512_set1_epi8(1);
            found++;
            row += plane->rows;
        }
    }
    return found;
}

/* Turn to token `first` of an eighth of the page, `tokens` each. Widths are powers of two: the rest of a division by
 * one, and the whole part times it, are bits of the eighth. */
static inline void turn_to(WidePart *parts, int n, int tokens, int eighth, int first)
{
    for (int p = 0; p < n; p++) {
        WidePart *part = parts + p;
        part->from = part->first + ((eighth & (part->bits - 1)) * tokens + first) * part->step;
        part->turn = _mm512_set1_epi32(((eighth & -part->bits) - part->shift) & 31);
    }
}

/* Codes [high - low][stride] of tokens `low` to `high`, `stride` a multiple of WIDE / 2; latents of no plane are 0. */
static void unpack_wide(const uint8_t *data, const Plane *planes, int n, int low, int high, uint8_t *out, int stride)
{
    const int tokens = planes[0].rows / planes[0].bits;
    WidePart parts[2 * WIDE_PLANES_LIMIT];
    WideBranches branches;
    for (int first = 0; first < stride; first += WIDE) {
        const int found = wide_parts(data, planes, n, first, parts, &branches);
        uint8_t *to = out + first;
        for (int token = low; token < high;) {
            const int eighth = token / tokens, end = (eighth + 1) * tokens, stop = end < high ? end : high;
            turn_to(parts, found, tokens, eighth, token - eighth * tokens);
            if (stride - first < WIDE)
                unpack_eighth_of(found, parts, stop - token, to, stride, 1);
            else
                unpack_eighth_of(found, parts, stop - token, to, stride, 0);
            to += (long)(stop - token) * stride;
            token = stop;
        }
    }
}

#endif
