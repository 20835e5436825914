/* Small matrix products on tiles that stay in cache.
 *
 * Vectors are GCC's and clang's own vector types, so that the same source becomes AVX2, AVX-512 or NEON.
 */
#ifndef KVCAR_TILE_H
#define KVCAR_TILE_H

#if defined(__SSSE3__)
#include <immintrin.h>
#endif
#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4 /* compilers take wider vectors apart element by element */
#endif
#define COLUMNS (2 * LANES) /* of one product: two vectors side by side */
#define ROWS 6              /* of one product: 12 accumulators, what 16 registers hold with room for operands */

typedef float vec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

static inline __attribute__((always_inline)) float sum_of(const vec x)
{
    float sum = 0;
    for (int lane = 0; lane < LANES; lane++)
        sum += x[lane];
    return sum;
}

/* Vectors that are summed up together: out[t] = sum of the lanes of x[t]. */
#if defined(__AVX512F__)
#define TOGETHER 4
static inline __attribute__((always_inline)) void store_sums(const vec *x, float *out)
{
    const __m512 a = (__m512)x[0], b = (__m512)x[1], c = (__m512)x[2], d = (__m512)x[3];
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const __m512d low = _mm512_unpacklo_pd((__m512d)ab, (__m512d)cd), high = _mm512_unpackhi_pd((__m512d)ab, (__m512d)cd);
    const __m512 all = _mm512_add_ps((__m512)low, (__m512)high);
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm256_castpd_ps(_mm512_extractf64x4_pd((__m512d)all, 1)));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}
#else
#define TOGETHER 1
static inline void store_sums(const vec *x, float *out) { *out = sum_of(*x); }
#endif

static inline float dot(const int n, const float *a, const float *b)
{
    vec sums = { 0 };
    int d = 0;
    for (; d + LANES <= n; d += LANES)
        sums += *(const vec *)(a + d) * *(const vec *)(b + d);
    float sum = sum_of(sums);
    for (; d < n; d++)
        sum += a[d] * b[d];
    return sum;
}

/* c[m][COLUMNS] = start[COLUMNS] (or what c holds, where start is null) + a[m][k] b[k][COLUMNS]. */
static inline __attribute__((always_inline)) void product(
    const int m, const int k, const float *a, const int a_stride, const float *b, const int b_stride,
    const float *start, float *c, const int c_stride)
{
    vec left[ROWS], right[ROWS];
    for (int i = 0; i < m; i++) {
        const float *from = start ? start : c + (long)i * c_stride;
        left[i] = *(const vec *)from;
        right[i] = *(const vec *)(from + LANES);
    }
    for (int l = 0; l < k; l++) {
        const vec b0 = *(const vec *)(b + (long)l * b_stride), b1 = *(const vec *)(b + (long)l * b_stride + LANES);
        for (int i = 0; i < m; i++) {
            const float x = a[(long)i * a_stride + l];
            left[i] += x * b0;
            right[i] += x * b1;
        }
    }
    for (int i = 0; i < m; i++) {
        *(vec *)(c + (long)i * c_stride) = left[i];
        *(vec *)(c + (long)i * c_stride + LANES) = right[i];
    }
}

/* The same for any number of rows; every case has its own count of rows, so that accumulators are registers. */
static __attribute__((unused)) void rows_product(
    int m, const int k, const float *a, const int a_stride, const float *b, const int b_stride, const float *start,
    float *c, const int c_stride)
{
    for (; m >= ROWS; m -= ROWS, a += (long)ROWS * a_stride, c += (long)ROWS * c_stride)
        product(ROWS, k, a, a_stride, b, b_stride, start, c, c_stride);
    switch (m) {
    case 5: product(5, k, a, a_stride, b, b_stride, start, c, c_stride); break;
    case 4: product(4, k, a, a_stride, b, b_stride, start, c, c_stride); break;
    case 3: product(3, k, a, a_stride, b, b_stride, start, c, c_stride); break;
    case 2: product(2, k, a, a_stride, b, b_stride, start, c, c_stride); break;
    case 1: product(1, k, a, a_stride, b, b_stride, start, c, c_stride); break;
    default: break;
    }
}

static inline int rounded_up(int n) { return (n + COLUMNS - 1) / COLUMNS * COLUMNS; }

#endif
