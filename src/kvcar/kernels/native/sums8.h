/* Weighted sums of codes over a tile's tokens in integers, with AVX-512's dot products of bytes: four tokens at a time.
 * Weights are rounded to 14 bits of the tile's largest and multiplied as two halves of 7. */
#ifndef KVCAR_SUMS8_H
#define KVCAR_SUMS8_H

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define HAS_SUMS8 1
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "decode8.h"
#include "tile.h"

#define TILE8 64     /* most tokens */
#define LATENTS8 64  /* of a block of codes */
#define ROWS8 3      /* summed together */
#define HIGHEST8 (127 * 128)

/* Weights of one row: the upper halves, then the lower ones, times `unit`. */
typedef struct {
    uint8_t halves[2][TILE8];
    float unit;
} Weights8;

/* Round `tokens` weights, none below 0; those of no token are 0. Returns by how much their sum changes: codes are far from 0
 * on average, so the mass must be that of the rounded ones. */
static float round_weights(const float *weights, int tokens, Weights8 *out)
{
    float top = 0;
    for (int t = 0; t < tokens; t++)
        top = weights[t] > top ? weights[t] : top;
    /* Far below a weight of 1, the largest there is; its inverse would be no number. */
    const float by = top > 1e-30f ? HIGHEST8 / top : 0;
    out->unit = top / HIGHEST8;
    memset(out->halves, 0, sizeof out->halves);
    float change = 0;
    for (int t = 0; t < tokens; t++) {
        const float wanted = weights[t] * by + 0.5f;
        const int32_t whole = (int32_t)(wanted > 0 ? wanted : 0); /* no integer stands for NaN, which the sum keeps */
        out->halves[0][t] = (uint8_t)(whole >> 7);
        out->halves[1][t] = (uint8_t)(whole & 127);
        change += (float)whole * out->unit - weights[t];
    }
    return change;
}

/* Codes [tokens][stride] as [blocks of LATENTS8][groups of four tokens][4][LATENTS8]: a word has a latent's codes of
 * four tokens, words 4k + i of vector v being latents 16k + 4v + i. Tokens beyond the last group may be any. */
static void mix_tokens(const uint8_t *codes, int tokens, int stride, uint8_t *out)
{
    for (int l = 0; l < stride; l += LATENTS8)
        for (int t = 0; t < tokens; t += 4, out += 4 * LATENTS8) {
            const uint8_t *from = codes + (long)t * stride + l;
            const __m512i a = _mm512_loadu_si512(from), b = _mm512_loadu_si512(from + stride);
            const __m512i c = _mm512_loadu_si512(from + 2L * stride), d = _mm512_loadu_si512(from + 3L * stride);
            const __m512i ab = _mm512_unpacklo_epi8(a, b), AB = _mm512_unpackhi_epi8(a, b);
            const __m512i cd = _mm512_unpacklo_epi8(c, d), CD = _mm512_unpackhi_epi8(c, d);
            _mm512_storeu_si512(out, _mm512_unpacklo_epi16(ab, cd));
            _mm512_storeu_si512(out + LATENTS8, _mm512_unpackhi_epi16(ab, cd));
            _mm512_storeu_si512(out + 2 * LATENTS8, _mm512_unpacklo_epi16(AB, CD));
            _mm512_storeu_si512(out + 3 * LATENTS8, _mm512_unpackhi_epi16(AB, CD));
        }
}

/* sums[row] = sums[row] shrink[row] + weights[row] codes, of a block of latents in the order of `mix_tokens`. */
static inline __attribute__((always_inline)) void add_sums8(
    const int rows, const uint8_t *mixed, const int groups, const Weights8 *const *weights, const float *shrink, float *const *sums)
{
    __m512i whole[ROWS8][2][4];
    for (int row = 0; row < rows; row++)
        for (int half = 0; half < 2; half++)
            for (int v = 0; v < 4; v++)
                whole[row][half][v] = _mm512_setzero_si512();
    for (int group = 0; group < groups; group++, mixed += 4 * LATENTS8) {
        __m512i own[4];
        for (int v = 0; v < 4; v++)
            own[v] = _mm512_loadu_si512(mixed + LATENTS8 * v);
        for (int row = 0; row < rows; row++)
            for (int half = 0; half < 2; half++) {
                int32_t four;
                memcpy(&four, weights[row]->halves[half] + 4 * group, 4);
                const __m512i w = _mm512_set1_epi32(four);
                for (int v = 0; v < 4; v++)
                    whole[row][half][v] = add_products(whole[row][half][v], own[v], w);
            }
    }
    for (int row = 0; row < rows; row++) {
        const __m512 unit = _mm512_set1_ps(weights[row]->unit), by = _mm512_set1_ps(shrink[row]);
        for (int v = 0; v < 4; v++) {
            const __m512i all = _mm512_add_epi32(_mm512_slli_epi32(whole[row][0][v], 7), whole[row][1][v]);
            float *to = sums[row] + LANES * v;
            _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_cvtepi32_ps(all), unit, _mm512_mul_ps(_mm512_loadu_ps(to), by)));
        }
    }
}

/* Latents of every block from the order of `mix_tokens` into their own. */
static void order_sums(float *sums, int64_t count)
{
    for (int64_t l = 0; l < count; l += LATENTS8) {
        float own[LATENTS8];
        memcpy(own, sums + l, sizeof own);
        for (int i = 0; i < LATENTS8; i++)
            sums[l + i] = own[i / 4 % 4 * 16 + i / 16 * 4 + i % 4];
    }
}

#else
#define HAS_SUMS8 0
#endif

#endif
