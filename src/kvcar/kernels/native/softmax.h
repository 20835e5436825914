/* Online softmax of rows of scores. Source: Milakov and Gimelshein 2018 (arXiv 1805.02867). */
#ifndef KVCAR_SOFTMAX_H
#define KVCAR_SOFTMAX_H

#include <math.h>
#include <stdint.h>

#include "tile.h"

#define NOTHING (-1e30f) /* maximum of a row that has seen no token */

/* exp(x) for x <= 0, to a few units in the last place; NaN for NaN. */
static inline float exp_of(const float given)
{
    const float x = given > -87.0f ? given : -87.0f; /* a number in any case, as no integer stands for NaN */
    const float n = __builtin_floorf(x * 1.44269504f + 0.5f);
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    union { int32_t i; float f; } scale = { .i = ((int32_t)n + 127) << 23 };
    return given == given ? p * scale.f : given;
}

static inline void start_rows(int rows, float *maximum, float *mass)
{
    for (int row = 0; row < rows; row++) {
        maximum[row] = NOTHING;
        mass[row] = 0;
    }
}

/* The largest of `x` and `n` scores. */
static inline float largest(const float *scores, int64_t n, float x)
{
    typedef int32_t choice __attribute__((vector_size(LANES * 4)));
    int64_t t = 0;
    if (n >= LANES) {
        vec maximum = *(const vec *)scores;
        for (t = LANES; t + LANES <= n; t += LANES) {
            const vec own = *(const vec *)(scores + t);
            const choice larger = own > maximum;
            maximum = (vec)(((choice)own & larger) | ((choice)maximum & ~larger));
        }
        for (int lane = 0; lane < LANES; lane++)
            x = maximum[lane] > x ? maximum[lane] : x;
    }
    for (; t < n; t++)
        x = scores[t] > x ? scores[t] : x;
    return x;
}

/* Scores of one row to weights, the running maximum and mass brought up to date; returns by what earlier sums shrink. */
static inline float soften(float *scores, int64_t low, int64_t high, float softcap, float *maximum, float *mass)
{
    if (softcap > 0)
        for (int64_t t = low; t < high; t++)
            scores[t] = softcap * tanhf(scores[t] / softcap);
    const float top = largest(scores + low, high - low, *maximum);
    float sum = 0;
    for (int64_t t = low; t < high; t++) {
        scores[t] = exp_of(scores[t] - top);
        sum += scores[t];
    }
    const float shrink = top > *maximum ? exp_of(*maximum - top) : 1.0f;
    *maximum = top;
    *mass = *mass * shrink + sum;
    return shrink;
}

/* The same of a row of which only some tokens may be seen, where `mask` is given; the others weigh 0. */
static inline void soften_masked(
    float *scores, int64_t tokens, const uint8_t *mask, int64_t mask_stride, float softcap, float *maximum, float *mass)
{
    if (!mask) {
        soften(scores, 0, tokens, softcap, maximum, mass);
        return;
    }
    const float before = *maximum;
    for (int64_t t = 0; t < tokens; t++) {
        if (softcap > 0)
            scores[t] = softcap * tanhf(scores[t] / softcap);
        if (mask[t * mask_stride] && scores[t] > *maximum)
            *maximum = scores[t];
    }
    if (*maximum > before)
        *mass *= exp_of(before - *maximum);
    for (int64_t t = 0; t < tokens; t++) {
        scores[t] = mask[t * mask_stride] ? exp_of(scores[t] - *maximum) : 0;
        *mass += scores[t];
    }
}

#endif
