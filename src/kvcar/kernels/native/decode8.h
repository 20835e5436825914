/* Decoders in 8 bits: codes (unsigned) times decoder (signed), four latents side by side in the decoder on every machine.
 * AVX-512's dot products of bytes are in decode8_wide.h. Elsewhere pairs of latents are summed in 16 bits, by x86's
 * products of bytes or by shifts and products that all vectors have, and widened before they can overflow: codes of
 * these latents have at most 7 bits, and `stops` says where, worked out from their bits. */
#ifndef KVCAR_DECODE8_H
#define KVCAR_DECODE8_H

#include <stdint.h>
#include <string.h>

#include "tile.h"

/* The decoder of one head: out[width] = bias + codes[exact] matrix + (codes after those) decoder scale. */
typedef struct {
    int width, exact, groups;
    const float *matrix; /* [exact][width] by a stride in elements */
    long matrix_stride;
    const int8_t *decoder; /* [groups of four latents][width][4] */
    const float *scale, *bias;
    const int32_t *stops; /* groups after which sums of 16 bits must be widened, the last being all of them */
} Decoder8;

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#include "decode8_wide.h"
#else
#define TOKENS8 2  /* decoded together */
#define VECTORS8 4 /* of LANES elements of a head, of each token */

typedef int32_t ints __attribute__((vector_size(LANES * 4), aligned(1), may_alias));
typedef int16_t shorts __attribute__((vector_size(LANES * 4), aligned(1), may_alias));

/* Both sums of two latents' products, of LANES elements, as 16 bits: `codes` has the four codes in every word. */
static inline __attribute__((always_inline)) shorts pair_products(const ints codes, const int8_t *decoder)
{
#if defined(__AVX512BW__)
    return (shorts)_mm512_maddubs_epi16((__m512i)codes, _mm512_loadu_si512(decoder));
#elif defined(__AVX2__) && !defined(__AVX512F__)
    return (shorts)_mm256_maddubs_epi16((__m256i)codes, _mm256_loadu_si256((const __m256i *)decoder));
#elif defined(__SSSE3__) && !defined(__AVX2__)
    return (shorts)_mm_maddubs_epi16((__m128i)codes, _mm_loadu_si128((const __m128i *)decoder));
#else
    const shorts own = *(const shorts *)decoder;
    const shorts even = (shorts)(codes & 0x00ff00ff), odd = (shorts)((codes >> 8) & 0x00ff00ff);
    return (own << 8 >> 8) * even + (own >> 8) * odd;
#endif
}

/* Sums of both 16-bit sums of every word. */
static inline __attribute__((always_inline)) ints widened(const shorts sums)
{
    return ((ints)sums << 16 >> 16) + ((ints)sums >> 16);
}

/* Elements `d` to `d` + vectors * LANES of some tokens. */
static inline __attribute__((always_inline)) void decode8_block(
    const int tokens, const int vectors, const Decoder8 *by, const int d, const uint8_t *codes, const int stride, float *out)
{
    const int width = by->width;
    const int8_t *row = by->decoder + 4 * d;
    ints wide[TOKENS8][VECTORS8];
    for (int t = 0; t < tokens; t++)
        for (int v = 0; v < vectors; v++)
            wide[t][v] = (ints){ 0 };
    const int32_t *stop = by->stops;
    for (int group = 0; group < by->groups; stop++) {
        shorts narrow[TOKENS8][VECTORS8];
        for (int t = 0; t < tokens; t++)
            for (int v = 0; v < vectors; v++)
                narrow[t][v] = (shorts){ 0 };
        for (const int end = *stop; group < end; group++, row += 4 * width)
            for (int t = 0; t < tokens; t++) {
                int32_t four;
                memcpy(&four, codes + (long)t * stride + by->exact + 4 * group, 4);
                const ints u = four - (ints){ 0 };
                for (int v = 0; v < vectors; v++)
                    narrow[t][v] += pair_products(u, row + 4 * LANES * v);
            }
        for (int t = 0; t < tokens; t++)
            for (int v = 0; v < vectors; v++)
                wide[t][v] += widened(narrow[t][v]);
    }
    for (int t = 0; t < tokens; t++)
        for (int v = 0; v < vectors; v++) {
            const int at = d + LANES * v;
            vec value = __builtin_convertvector(wide[t][v], vec) * *(const vec *)(by->scale + at) + *(const vec *)(by->bias + at);
            for (int e = 0; e < by->exact; e++)
                value += (float)codes[(long)t * stride + e] * *(const vec *)(by->matrix + e * by->matrix_stride + at);
            *(vec *)(out + (long)t * width + at) = value;
        }
}
#endif

static inline __attribute__((always_inline)) void decode8_rows(
    const int tokens, const Decoder8 *by, const uint8_t *codes, const int stride, float *out)
{
    int d = 0;
    for (; d + VECTORS8 * LANES <= by->width; d += VECTORS8 * LANES)
        decode8_block(tokens, VECTORS8, by, d, codes, stride, out);
    for (; d < by->width; d += LANES)
        decode8_block(tokens, 1, by, d, codes, stride, out);
}

/* Vectors [tokens][width] of codes [tokens][stride], of which up to 3 behind the last are read too; `width` is a
 * multiple of LANES. */
static void decode8(int tokens, const Decoder8 *by, const uint8_t *codes, int stride, float *out)
{
    for (; tokens >= TOKENS8; tokens -= TOKENS8, codes += (long)TOKENS8 * stride, out += (long)TOKENS8 * by->width)
        decode8_rows(TOKENS8, by, codes, stride, out);
    for (; tokens > 0; tokens--, codes += stride, out += by->width)
        decode8_rows(1, by, codes, stride, out);
}

/* out[rows][width] += (sums [rows][stride] of `latents` codes after the exact ones) decoder scale; `rows` up to 4. */
static inline __attribute__((always_inline)) void decode8_sums_of(
    const int rows, const Decoder8 *by, const int latents, const float *sums, const int stride, float *out)
{
    typedef int32_t lanes __attribute__((vector_size(LANES * 4), aligned(1), may_alias));
    for (int d = 0; d < by->width; d += LANES) {
        vec total[4];
        for (int row = 0; row < rows; row++)
            total[row] = (vec){ 0 };
        for (int l = 0; l < latents; l += 4) {
            const lanes own = *(const lanes *)(by->decoder + ((long)l * by->width + 4 * d));
            const vec column[4] = {
                __builtin_convertvector(own << 24 >> 24, vec), __builtin_convertvector(own << 16 >> 24, vec),
                __builtin_convertvector(own << 8 >> 24, vec), __builtin_convertvector(own >> 24, vec)
            };
            /* Behind the last latent there is no sum. */
            for (int i = 0; i < 4 && l + i < latents; i++)
                for (int row = 0; row < rows; row++)
                    total[row] += sums[(long)row * stride + l + i] * column[i];
        }
        for (int row = 0; row < rows; row++)
            *(vec *)(out + (long)row * by->width + d) += total[row] * *(const vec *)(by->scale + d);
    }
}

/* The same of any number of rows; every case has its own count of rows, so that sums are registers. */
static void decode8_sums(int rows, const Decoder8 *by, int latents, const float *sums, int stride, float *out)
{
    for (; rows >= 4; rows -= 4, sums += 4L * stride, out += 4L * by->width)
        decode8_sums_of(4, by, latents, sums, stride, out);
    switch (rows) {
    case 3: decode8_sums_of(3, by, latents, sums, stride, out); break;
    case 2: decode8_sums_of(2, by, latents, sums, stride, out); break;
    case 1: decode8_sums_of(1, by, latents, sums, stride, out); break;
    default: break;
    }
}

#endif
