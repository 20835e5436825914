/* Packed planes of a page to codes; docs/format.md has the layout. */
#ifndef KVCAR_UNPACK_H
#define KVCAR_UNPACK_H

#include <stdint.h>
#include <string.h>

/* `trellis`: whether the lowest of its bits are branches; see kernels/trellis. */
typedef struct {
    int32_t bits, shift, start, count, rows, offset, trellis;
} Plane;

#define CHUNK 64 /* latents of a plane with branches that are worked out together */
#define MOST_ROWS 512 /* of such a plane: it has at most 4 bits, and a page at most 1024 tokens */

/* What branches of `count` latents, CHUNK at most, come to: [rows][CHUNK] of the plane with the levels' second bits in the branches'
 * place in `levels`, and what goes below them in `halves`. The token before a row's first is the last row's, a place lower. */
static inline void follow_branches(const Plane *plane, const uint8_t *from, const int count, uint8_t *levels, uint8_t *halves)
{
    const int rows = plane->rows, bits = plane->bits;
    const uint8_t mask = bits == 1 ? 0xff : bits == 2 ? 0x55 : 0x11;
    uint8_t back[3][CHUNK];
    for (int row = 0; row < 3; row++)
        for (int j = 0; j < count; j++)
            back[row][j] = (uint8_t)((from[(long)(rows - 1 - row) * plane->count + j] & mask) << bits);
    for (int row = 0; row < rows; row++, from += plane->count, levels += CHUNK, halves += CHUNK)
        for (int j = 0; j < count; j++) {
            const uint8_t own = from[j], one = back[0][j], two = back[1][j];
            levels[j] = own ^ one ^ back[2][j];
            halves[j] = two;
            back[2][j] = two, back[1][j] = one, back[0][j] = own & mask;
        }
}

#if defined(__AVX512BW__)
#include "unpack_wide.h"
#endif

typedef uint32_t words __attribute__((vector_size(16), aligned(1), may_alias));

/* Bits of `from` above `down` under `mask`, moved up by `shift`, for as many bytes as a word or vector has: what
 * crosses a byte's border is masked off. */
#define PART(from, down, mask, shift) ((((from) >> (down)) & ((mask) * 0x01010101u)) << (shift))

static inline void unpack_words(const uint8_t *from, const int down, const uint32_t mask, const int shift, uint8_t *to)
{
    words part = PART(*(const words *)from, down, mask, shift);
    if (shift)
        part |= *(const words *)to;
    *(words *)to = part;
}

/* The same of the first `count` bytes alone, the rest of the 16 at `to` staying as they are; `of_count` has ones in
 * those bytes. */
static inline void unpack_few(
    const uint8_t *from, const words of_count, const int down, const uint32_t mask, const int shift, uint8_t *to)
{
    const words part = PART(*(const words *)from, down, mask, shift) & of_count, before = *(const words *)to;
    *(words *)to = part | (before & (shift ? ~(words){ 0 } : ~of_count));
}

/* Ones in the first `count` bytes of a vector. */
static inline words first_bytes(int count)
{
    uint8_t bytes[16] = { 0 };
    words mask;
    memset(bytes, 0xff, count < 16 ? count : 16);
    memcpy(&mask, bytes, 16);
    return mask;
}

/* to[j] = (or |=, where `shift`) the part of from[j], `count` bytes. The last vector may overlap the one before: doing
 * a byte twice changes nothing. Nothing is read at `end` or beyond; up to 16 bytes at `to` are written as they were. */
static inline __attribute__((always_inline)) void unpack_row(
    const uint8_t *from, const uint8_t *end, const int count, const words of_count, const int down, const uint32_t mask,
    const int shift, uint8_t *to)
{
    int j = 0;
    if (count >= 16) {
        for (; j + 16 <= count; j += 16)
            unpack_words(from + j, down, mask, shift, to + j);
        if (j < count)
            unpack_words(from + count - 16, down, mask, shift, to + count - 16);
    } else if (from + 16 <= end)
        unpack_few(from, of_count, down, mask, shift, to);
    else
        for (; j < count; j++) {
            const uint8_t part = (uint8_t)(((from[j] >> down) & mask) << shift);
            to[j] = shift ? to[j] | part : part;
        }
}

/* A plane of `bits` bits, known when this is compiled, of tokens `low` to `high`. */
static inline __attribute__((always_inline)) void unpack_plane(
    const int bits, const uint8_t *data, const uint8_t *end, const Plane plane, const int low, const int high, uint8_t *out,
    const int stride)
{
    const words of_count = first_bytes(plane.count);
    for (int place = 0; place < 8 / bits; place++) {
        const int before = place * plane.rows, stop = high - before < plane.rows ? high - before : plane.rows;
        for (int row = low > before ? low - before : 0; row < stop; row++) {
            const uint8_t *from = data + plane.offset + (long)row * plane.count;
            uint8_t *to = out + (long)(before + row - low) * stride + plane.start;
            if (plane.shift)
                unpack_row(from, end, plane.count, of_count, place * bits, (1u << bits) - 1, plane.shift, to);
            else
                unpack_row(from, end, plane.count, of_count, place * bits, (1u << bits) - 1, 0, to);
        }
    }
}

/* A plane of any bits, known when this runs. */
static inline void unpack_any(
    const uint8_t *data, const uint8_t *end, const Plane plane, const int low, const int high, uint8_t *out, const int stride)
{
    switch (plane.bits) {
    case 1: unpack_plane(1, data, end, plane, low, high, out, stride); break;
    case 2: unpack_plane(2, data, end, plane, low, high, out, stride); break;
    case 4: unpack_plane(4, data, end, plane, low, high, out, stride); break;
    default: unpack_plane(8, data, end, plane, low, high, out, stride); break;
    }
}

/* A plane with branches, some latents at a time. */
static void unpack_branches(const uint8_t *data, const Plane plane, const int low, const int high, uint8_t *out, const int stride)
{
    uint8_t levels[MOST_ROWS * CHUNK + 16], halves[MOST_ROWS * CHUNK + 16];
    for (int first = 0; first < plane.count; first += CHUNK) {
        const int count = plane.count - first < CHUNK ? plane.count - first : CHUNK;
        follow_branches(&plane, data + plane.offset + first, count, levels, halves);
        for (int row = 0; row < plane.rows; row++) { /* from rows of CHUNK to rows of `count` */
            memmove(halves + (long)row * count, halves + (long)row * CHUNK, (size_t)count);
            memmove(levels + (long)row * count, levels + (long)row * CHUNK, (size_t)count);
        }
        Plane part = { plane.bits, 0, plane.start + first, count, plane.rows, 0, 0 };
        unpack_any(halves, halves + sizeof halves, part, low, high, out, stride);
        part.shift = 1;
        unpack_any(levels, levels + sizeof levels, part, low, high, out, stride);
    }
}

/* Codes [high - low][stride], and room for 16 more, of tokens `low` to `high` of the segment at `data` in a page that
 * ends at `end`. Planes of low bits come before those that add to them. */
static void unpack(
    const uint8_t *data, const uint8_t *end, const Plane *planes, int n, int low, int high, uint8_t *out, int stride)
{
#if defined(__AVX512BW__)
    if (has_wide_room(planes, n)) {
        unpack_wide(data, planes, n, low, high, out, stride);
        return;
    }
#endif
    for (int p = 0; p < n; p++)
        if (planes[p].trellis)
            unpack_branches(data, planes[p], low, high, out, stride);
        else
            unpack_any(data, end, planes[p], low, high, out, stride);
}

/* Codes side by side as floats. */
static inline void widen(const uint8_t *codes, int count, float *out)
{
    for (int j = 0; j < count; j++)
        out[j] = (float)(int)codes[j];
}

/* The first `count` codes of each of `tokens` rows as floats. */
static inline void to_floats(const uint8_t *codes, int tokens, int count, int stride, float *out, int out_stride)
{
    for (int t = 0; t < tokens; t++)
        widen(codes + (long)t * stride, count, out + (long)t * out_stride);
}

#endif
