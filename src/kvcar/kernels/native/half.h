/* float16 to float. */
#ifndef KVCAR_HALF_H
#define KVCAR_HALF_H

#include <stdint.h>
#if defined(__F16C__)
#include <immintrin.h>
#endif

/* Of finite numbers alone: the exponent's other bias is a power of two, which subnormals need too. */
static inline float float_of_half(const uint16_t half)
{
    union { uint32_t i; float f; } wide = { .i = (uint32_t)(half & 0x7fff) << 13 }, sign = { .i = (uint32_t)(half & 0x8000) << 16 };
    wide.f *= 0x1p112f;
    wide.i |= sign.i;
    return wide.f;
}

static inline void floats_of_halves(const uint16_t *halves, const int count, float *floats)
{
    int i = 0;
#if defined(__F16C__)
    for (; i + 8 <= count; i += 8)
        _mm256_storeu_ps(floats + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(halves + i))));
#endif
    for (; i < count; i++)
        floats[i] = float_of_half(halves[i]);
}

#endif
