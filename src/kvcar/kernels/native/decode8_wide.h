/* Decoding codes with 8-bit decoders by AVX-512's dot products: four latents at a time, summed in 32 bits, so that
 * nothing can overflow; a row of the decoder is read once for four tokens. */
#ifndef KVCAR_DECODE8_WIDE_H
#define KVCAR_DECODE8_WIDE_H

#include <immintrin.h>

#define TOKENS8 4  /* decoded together */
#define VECTORS8 4 /* of LANES elements of a head, of each token */

/* sums += products of four unsigned bytes of `u` and four signed ones of `d`. Written out, as compilers copy sums about
 * around the intrinsic and then run out of registers. */
static inline __attribute__((always_inline)) __m512i add_products(__m512i sums, const __m512i u, const __m512i d)
{
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(u), "v"(d));
    return sums;
}

/* Elements `d` to `d` + vectors * LANES of some tokens' keys. */
static inline __attribute__((always_inline)) void decode8_block(
    const int tokens, const int vectors, const Decoder8 *by, const int d, const uint8_t *codes, const int stride, float *keys)
{
    const int width = by->width;
    __m512i sums[TOKENS8][VECTORS8];
    for (int t = 0; t < tokens; t++)
        for (int v = 0; v < vectors; v++)
            sums[t][v] = _mm512_setzero_si512();
    const int8_t *row = by->decoder + 4 * d;
    for (int group = 0; group < by->groups; group++, row += 4 * width) {
        __m512i own[VECTORS8];
        for (int v = 0; v < vectors; v++)
            own[v] = _mm512_loadu_si512(row + 4 * LANES * v);
        for (int t = 0; t < tokens; t++) {
            int32_t four;
            memcpy(&four, codes + (long)t * stride + by->exact + 4 * group, 4);
            const __m512i u = _mm512_set1_epi32(four);
            for (int v = 0; v < vectors; v++)
                sums[t][v] = add_products(sums[t][v], u, own[v]);
        }
    }
    __m512 values[TOKENS8][VECTORS8];
    for (int v = 0; v < vectors; v++) {
        const __m512 scale = _mm512_loadu_ps(by->scale + d + LANES * v), bias = _mm512_loadu_ps(by->bias + d + LANES * v);
        for (int t = 0; t < tokens; t++)
            values[t][v] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[t][v]), scale, bias);
    }
    for (int e = 0; e < by->exact; e++) {
        __m512 own[VECTORS8];
        for (int v = 0; v < vectors; v++)
            own[v] = _mm512_loadu_ps(by->matrix + e * by->matrix_stride + d + LANES * v);
        for (int t = 0; t < tokens; t++) {
            const __m512 code = _mm512_set1_ps((float)codes[(long)t * stride + e]);
            for (int v = 0; v < vectors; v++)
                values[t][v] = _mm512_fmadd_ps(code, own[v], values[t][v]);
        }
    }
    for (int t = 0; t < tokens; t++)
        for (int v = 0; v < vectors; v++)
            _mm512_storeu_ps(keys + (long)t * width + d + LANES * v, values[t][v]);
}

#endif
