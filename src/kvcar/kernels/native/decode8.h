/* Decoding codes with 8-bit decoders: codes (unsigned) times decoder (signed). AVX-512's dot products of bytes do it in
 * decode8_wide.h; AVX2 takes two latents at a time, in 16-bit sums that are widened before they can overflow: `stops`
 * says where, worked out from the decoder itself. Elsewhere decoders stay float. */
#ifndef KVCAR_DECODE8_H
#define KVCAR_DECODE8_H

#include <stdint.h>
#include <string.h>

#if defined(__AVX512VNNI__) && defined(__AVX512F__)
#define DECODE8_LATENTS 4 /* side by side in a decoder; 0: no decoder of 8 bits is served */
#elif defined(__AVX2__)
#define DECODE8_LATENTS 2
#else
#define DECODE8_LATENTS 0
#endif

/* The decoder of one head's keys: keys[width] = bias + codes[exact] matrix + (codes after those) decoder scale; there
 * is at least one group. */
typedef struct {
    int width, exact, groups;
    const float *matrix;   /* [exact][width] */
    const int8_t *decoder; /* [groups][width][DECODE8_LATENTS] */
    const float *scale, *bias;
    int n_stops;
    const int32_t *stops; /* groups after which 16-bit sums must be widened, the last being all of them */
} Decoder8;

#if DECODE8_LATENTS == 4
#include "decode8_wide.h"
#elif DECODE8_LATENTS == 2
#include <immintrin.h>
#define LANES8 16 /* elements of a head in one vector of 16-bit sums */

/* out[vectors * LANES8], elements `d` on of one token's keys. */
static inline __attribute__((always_inline)) void decode8_block(
    const int vectors, const Decoder8 *by, const int d, const uint8_t *codes, float *out)
{
    const int width = by->width;
    const uint8_t *rounded = codes + by->exact;
    const int8_t *row = by->decoder + 2 * d;
    __m256i wide[8];
    int pair = 0;
    for (int v = 0; v < 2 * vectors; v++)
        wide[v] = _mm256_setzero_si256();
    for (int stop = 0; stop < by->n_stops; stop++) {
        __m256i narrow[4];
        for (int v = 0; v < vectors; v++)
            narrow[v] = _mm256_setzero_si256();
        for (const int end = by->stops[stop]; pair < end; pair++, row += 2 * width) {
            uint16_t two;
            memcpy(&two, rounded + 2 * pair, 2);
            const __m256i u = _mm256_set1_epi16((short)two);
            for (int v = 0; v < vectors; v++) {
                const __m256i own = _mm256_loadu_si256((const __m256i *)(row + 2 * LANES8 * v));
                narrow[v] = _mm256_add_epi16(narrow[v], _mm256_maddubs_epi16(u, own));
            }
        }
        for (int v = 0; v < vectors; v++) {
            const __m256i low = _mm256_cvtepi16_epi32(_mm256_castsi256_si128(narrow[v]));
            const __m256i high = _mm256_cvtepi16_epi32(_mm256_extracti128_si256(narrow[v], 1));
            wide[2 * v] = _mm256_add_epi32(wide[2 * v], low);
            wide[2 * v + 1] = _mm256_add_epi32(wide[2 * v + 1], high);
        }
    }
    __m256 value[8];
    for (int v = 0; v < 2 * vectors; v++) {
        value[v] = _mm256_mul_ps(_mm256_cvtepi32_ps(wide[v]), _mm256_loadu_ps(by->scale + d + 8 * v));
        value[v] = _mm256_add_ps(value[v], _mm256_loadu_ps(by->bias + d + 8 * v));
    }
    /* Latents outside, so that a code becomes a float once. */
    for (int e = 0; e < by->exact; e++) {
        const __m256 code = _mm256_set1_ps((float)codes[e]);
        for (int v = 0; v < 2 * vectors; v++) {
            const __m256 own = _mm256_loadu_ps(by->matrix + (long)e * width + d + 8 * v);
            value[v] = _mm256_add_ps(value[v], _mm256_mul_ps(code, own));
        }
    }
    for (int v = 0; v < 2 * vectors; v++)
        _mm256_storeu_ps(out + 8 * v, value[v]);
}

/* Keys [tokens][width]; `width` is a multiple of LANES8. */
static void decode8(int tokens, const Decoder8 *by, const uint8_t *codes, int stride, float *keys)
{
    for (int t = 0; t < tokens; t++, codes += stride, keys += by->width) {
        int d = 0;
        for (; d + 4 * LANES8 <= by->width; d += 4 * LANES8)
            decode8_block(4, by, d, codes, keys + d);
        for (; d < by->width; d += LANES8)
            decode8_block(1, by, d, codes, keys + d);
    }
}
#endif

#endif
