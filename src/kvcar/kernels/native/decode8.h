/* Decoding codes with 8-bit decoders: codes (unsigned) times decoder (signed), two latents at a time, in 16-bit sums that
 * are widened before they can overflow; `stops` says where, worked out from the decoder itself.
 *
 * For AVX2; decode8_wide.h is for AVX-512 with its dot products of bytes. Elsewhere decoders stay float. */
#ifndef KVCAR_DECODE8_H
#define KVCAR_DECODE8_H

#include <stdint.h>

#if defined(__AVX512VNNI__) && defined(__AVX512F__)
#include "decode8_wide.h"
#elif defined(__AVX2__)
#include <immintrin.h>
#define DECODE8_LATENTS 2 /* side by side in a decoder; 0: no decoder of 8 bits is served */
#define LANES8 16 /* elements of a head in one vector of 16-bit sums */

/* out[VECTORS * LANES8] = bias + scale * (codes decoder), of one token, plus its `exact` first codes times `matrix`. */
static inline __attribute__((always_inline)) void decode8_block(
    const int vectors, const uint8_t *codes, const int8_t *decoder, const int decoder_stride, const int32_t *stops,
    const int n_stops, const float *scale, const float *bias, const int exact, const uint8_t *first, const float *matrix,
    float *out)
{
    __m256i wide[8];
    int pair = 0;
    for (int stop = 0; stop < n_stops; stop++) {
        __m256i narrow[4];
        for (int v = 0; v < vectors; v++)
            narrow[v] = _mm256_setzero_si256();
        for (const int end = stops[stop]; pair < end; pair++) {
            uint16_t two;
            memcpy(&two, codes + 2 * pair, 2);
            const __m256i u = _mm256_set1_epi16((short)two);
            for (int v = 0; v < vectors; v++) {
                const __m256i d = _mm256_loadu_si256((const __m256i *)(decoder + (long)pair * decoder_stride + 32 * v));
                narrow[v] = _mm256_add_epi16(narrow[v], _mm256_maddubs_epi16(u, d));
            }
        }
        for (int v = 0; v < vectors; v++) {
            const __m256i low = _mm256_cvtepi16_epi32(_mm256_castsi256_si128(narrow[v]));
            const __m256i high = _mm256_cvtepi16_epi32(_mm256_extracti128_si256(narrow[v], 1));
            wide[2 * v] = stop ? _mm256_add_epi32(wide[2 * v], low) : low;
            wide[2 * v + 1] = stop ? _mm256_add_epi32(wide[2 * v + 1], high) : high;
        }
    }
    __m256 value[8];
    for (int v = 0; v < 2 * vectors; v++) {
        value[v] = _mm256_mul_ps(_mm256_cvtepi32_ps(wide[v]), _mm256_loadu_ps(scale + 8 * v));
        value[v] = _mm256_add_ps(value[v], _mm256_loadu_ps(bias + 8 * v));
    }
    /* Latents outside, so that a code becomes a float once. */
    for (int e = 0; e < exact; e++) {
        const __m256 code = _mm256_set1_ps((float)first[e]);
        for (int v = 0; v < 2 * vectors; v++) {
            const __m256 row = _mm256_loadu_ps(matrix + (long)e * (decoder_stride / 2) + 8 * v);
            value[v] = _mm256_add_ps(value[v], _mm256_mul_ps(code, row));
        }
    }
    for (int v = 0; v < 2 * vectors; v++)
        _mm256_storeu_ps(out + 8 * v, value[v]);
}

/* All tokens and all elements of keys of `latents` latents, whose first `exact` ones have the float decoder `matrix` [exact][width]; `width` is
 * a multiple of LANES8, and there is at least one stop. */
static void decode8(
    int tokens, int width, const uint8_t *codes, int stride, int latents, int exact, const float *matrix, const int8_t *decoder,
    const int32_t *stops, int n_stops, const float *scale, const float *bias, float *out, int out_stride)
{
    (void)latents;
    for (int t = 0; t < tokens; t++, codes += stride, out += out_stride) {
        int d = 0;
        for (; d + 4 * LANES8 <= width; d += 4 * LANES8)
            decode8_block(
                4, codes + exact, decoder + 2 * d, 2 * width, stops, n_stops, scale + d, bias + d, exact, codes, matrix + d, out + d);
        for (; d < width; d += LANES8)
            decode8_block(
                1, codes + exact, decoder + 2 * d, 2 * width, stops, n_stops, scale + d, bias + d, exact, codes, matrix + d, out + d);
    }
}
#else
#define DECODE8_LATENTS 0
#endif

#endif
