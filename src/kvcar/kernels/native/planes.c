/* Packing codes into the planes of pages, and back; docs/format.md has the layout. */
#include <stdlib.h>

#include "parallel.h"
#include "tile.h"
#include "unpack.h"

/* Segments of pages [outer][inner], by strides in bytes, and their stored values float [outer][inner][tokens][width],
 * of which the first `raw` are not in planes and not touched here. Planes count latents from `raw` on. */
typedef struct {
    uint8_t *data;
    int64_t outer, inner, outer_stride, inner_stride, size;
    float *values;
    const Plane *planes;
    int32_t n_planes, tokens, width, raw, threads, spare;
} Segments;

static uint8_t *segment_at(const Segments *s, int64_t page)
{
    return s->data + page / s->inner * s->outer_stride + page % s->inner * s->inner_stride;
}

static void pack_plane(const Plane *plane, const uint8_t *codes, int stride, uint8_t *data)
{
    const uint8_t mask = (uint8_t)((1u << plane->bits) - 1);
    uint8_t *to = data + plane->offset;
    for (int row = 0; row < plane->rows; row++, to += plane->count)
        for (int place = 0; place < 8 / plane->bits; place++) {
            const uint8_t *from = codes + (long)(row + place * plane->rows) * stride + plane->start;
            for (int j = 0; j < plane->count; j++) {
                const uint8_t part = (uint8_t)((from[j] >> plane->shift & mask) << (place * plane->bits));
                to[j] = place ? to[j] | part : part;
            }
        }
}

/* Put the branches of levels [tokens][stride] of latents `first` to `stop` in the place of their second bits. */
static void lay_branches(int tokens, int stride, int first, int stop, uint8_t *levels)
{
    for (int t = 1; t < tokens; t++) {
        uint8_t *own = levels + (long)t * stride;
        const uint8_t *one = own - stride, *three = t >= 3 ? own - 3L * stride : 0;
        for (int j = first; j < stop; j++)
            own[j] ^= (one[j] ^ (three ? three[j] : 0)) & 2;
    }
}

static int unpack_page(const void *segments, int64_t page, int worker)
{
    (void)worker;
    const Segments *s = segments;
    const int count = s->width - s->raw, stride = rounded_up(count);
    const uint8_t *data = segment_at(s, page);
    uint8_t *codes = malloc((size_t)s->tokens * stride + 16);
    if (!codes)
        return 1;
    unpack(data, data + s->size, s->planes, s->n_planes, 0, s->tokens, codes, stride);
    to_floats(codes, s->tokens, count, stride, s->values + page * s->tokens * s->width + s->raw, s->width);
    free(codes);
    return 0;
}

static int pack_page(const void *segments, int64_t page, int worker)
{
    (void)worker;
    const Segments *s = segments;
    const int count = s->width - s->raw, stride = rounded_up(count);
    const float *values = s->values + page * s->tokens * s->width + s->raw;
    uint8_t *codes = malloc((size_t)s->tokens * stride);
    if (!codes)
        return 1;
    for (int t = 0; t < s->tokens; t++)
        for (int j = 0; j < count; j++)
            codes[(long)t * stride + j] = (uint8_t)(int)values[(long)t * s->width + j];
    for (int p = 0; p < s->n_planes; p++)
        if (s->planes[p].trellis)
            lay_branches(s->tokens, stride, s->planes[p].start, s->planes[p].start + s->planes[p].count, codes);
    for (int p = 0; p < s->n_planes; p++)
        pack_plane(s->planes + p, codes, stride, segment_at(s, page));
    free(codes);
    return 0;
}

/* Values of all segments; 0, or 1 where memory is missing. */
int kvcar_unpack(const Segments *s) { return in_parallel(s->threads, s->outer * s->inner, unpack_page, s); }

/* Planes of all segments; 0, or 1 where memory is missing. */
int kvcar_pack(const Segments *s) { return in_parallel(s->threads, s->outer * s->inner, pack_page, s); }
