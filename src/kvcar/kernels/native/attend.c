/* Decode attention over packed pages and what is kept exactly: unpack, decode and rotate a tile of keys, scores, online
 * softmax, values summed as latents and decoded once. The sequence is split among threads; each keeps its own running
 * maximum, mass and sums, merged at the end.
 *
 * Keys need rotating by position. A tile starts at some position; the queries are rotated back by that once, so that
 * keys turn by their place in the tile only, which is one small table for all tiles, layers and sequences.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "parallel.h"
#include "tile.h"
#include "unpack.h"
#include "decode8.h"
#include "softmax.h"
#include "sums8.h"

#define TILE 64
#define CACHE_LINE 64
#define LATENTS 64 /* rows of codes and sums are whole blocks of */

/* A part of every page that some of the layer's keys and values are in; `place` is where its codes of a tile go. */
typedef struct {
    int64_t offset, place; /* bytes into the page; into the codes */
    const Plane *plane;
    int32_t planes, latents;
} Segment;

/* How a segment gives some heads: vectors are bias + codes[exact] matrix + (codes after those) decoder scale.
 *
 * `matrix` is [exact][heads * padded head dim] by a stride in elements; where `half` is given, the same in float16, it is made of
 * that. `decoder` is [heads][groups of four latents][padded head dim][4] by a stride in bytes between heads; `scale` and `bias` are [heads][padded
 * head dim]. `stops`: see decode8.h.
 * Keys that rotate: elements of a head come in the order (first of each rotated pair, second, the rest), and so in `query`
 * [batch][heads of the layer][rows][padded head dim], unscaled.
 * Keys that do not rotate have no decoder: `query` [batch][heads of the layer][rows][latents] holds it already and `constant`
 * [batch][heads of the layer][rows] is what its bias adds to a score.
 * Values: `sums` [batch][splits][heads * rows][padded latents] is written.
 * Where `mean_scale` is given, every page adds a mean error to its vectors, at `means` bytes into the page: a float16 step and codes of 2
 * bits. Element `d` of a head is the unit's element `mean_place[d]`, over the scale `mean_scale[d]`, both [heads][padded head dim]. Of values
 * these are summed too, in `shifts` [batch][splits][heads * rows][padded head dim]. */
typedef struct {
    int32_t segment, heads, exact, groups;
    const int32_t *head;
    const float *matrix;
    const uint16_t *half;
    int64_t matrix_stride, half_stride;
    const int8_t *decoder;
    int64_t decoder_stride;
    const float *scale, *bias;
    const int32_t *stops;
    const float *query, *constant;
    float *sums;
    int64_t means;
    const int32_t *mean_place;
    const float *mean_scale;
    float *shifts;
} Reader;

typedef struct {
    const uint8_t *base;
    int64_t batch_stride, page_stride, pages, page_bytes;
} Arena;

/* Tokens kept exactly: [batch][heads][tokens][head dim] by strides in elements, of one of `ExactKind`. */
typedef struct {
    const void *base;
    int64_t batch_stride, head_stride, token_stride;
} Side;

enum ExactKind { FLOAT32, BFLOAT16, FLOAT16 };

typedef struct {
    Side keys, values;
    int64_t tokens;
    int32_t kind, spare;
} Part;

typedef struct {
    int32_t batch, heads, rows, head_dim, page_tokens, pairs, splits, threads;
    int64_t tokens, positions; /* in pages; that the tables of angles reach */
    const int64_t *first, *offset; /* [batch]: first token attended; position of token 0 is -offset */
    const int64_t *shown;          /* [batch][pages] by a stride: tokens of a page attended, from its first on; null: all */
    int64_t shown_stride;
    const float *fine_cos, *fine_sin, *coarse_cos, *coarse_sin; /* [TILE or more][pairs] each */
    float scaling, softcap;                                     /* on scores; 0 for no cap */
    int32_t segments, key_readers, value_readers, arenas;
    Segment *segment;
    Reader *keys, *values;
    const Arena *arena;
    float *scratch;                                    /* as many as kvcar_scratch says */
    const float *query;                                /* [batch][heads][rows][head dim] in the model's order */
    const Part *part;                                  /* tokens kept exactly, one part after the other */
    const uint8_t *mask;                               /* null: all may be attended */
    int64_t mask_batch_stride, mask_row_stride, mask_token_stride;
    int32_t mask_rows, parts;                          /* row r of the queries has row r % mask_rows of the mask */
    int32_t sums_in_8_bits, spare;                     /* whether sums of values may be taken in integers */
    float *out;                                        /* [batch][heads][rows][head dim]; has exact sums meanwhile */
    float *maximum, *mass;                             /* [batch][splits + 1][heads * rows], the last of what is exact */
    float *rooms;                                      /* of threads, [threads][room] */
    int64_t room;
    const float *sinks;                                /* [heads][rows] scores that no value belongs to, or null */
    const int64_t *table;                              /* [batch][pages] by a stride: pages of the first arena, null: in their order */
    int64_t table_stride;
} Job;

/* What a thread works in. Codes of segments are [TILE][padded latents] from the tile's first token that is attended. */
typedef struct {
    uint8_t *codes;
    float *floats;     /* codes of the segment `of_floats` as floats */
    uint8_t *mixed;    /* codes of the segment `of_mixed` in the order of sums8.h */
    float *tile;       /* decoded keys, [TILE][padded head dim] */
    float *turned;     /* queries rotated to the tile's start, [rows][padded head dim] */
    float *weights;    /* [heads * rows][TILE] scores, then weights */
    float *shrink;     /* [heads * rows] */
    void *rounded;     /* [heads * rows] weights as in sums8.h */
    float *decoded;    /* [rows][padded head dim] */
    float *mean;       /* [padded head dim] of a page and head */
    int of_floats, of_mixed;
} Scratch;

static int64_t padded(int64_t latents) { return (latents + LATENTS - 1) / LATENTS * LATENTS; }
static int64_t latents_of(const Job *job, const Reader *reader) { return job->segment[reader->segment].latents; }
static int64_t stride_of(const Job *job, const Reader *reader) { return padded(latents_of(job, reader)); }
static int64_t size_of_sums(const Job *job, const Reader *reader)
{
    return (int64_t)reader->heads * job->rows * stride_of(job, reader);
}
static int64_t size_of_shifts(const Job *job, const Reader *reader)
{
    return reader->mean_scale ? (int64_t)reader->heads * job->rows * rounded_up(job->head_dim) : 0;
}

/* Where a page begins and, in `end`, where it ends. */
static const uint8_t *page_at(const Job *job, int b, int64_t page, const uint8_t **end)
{
    if (job->table) {
        const uint8_t *data = job->arena->base + job->table[b * job->table_stride + page] * job->arena->page_stride;
        *end = data + job->arena->page_bytes;
        return data;
    }
    for (int a = 0; a < job->arenas; a++) {
        const Arena *arena = job->arena + a;
        if (page < arena->pages) {
            const uint8_t *data = arena->base + b * arena->batch_stride + page * arena->page_stride;
            *end = data + arena->page_bytes;
            return data;
        }
        page -= arena->pages;
    }
    *end = 0;
    return 0;
}

/* Queries of one head, scaled and turned back by the position of the tile's first token. */
static void turn_queries(const Job *job, const float *query, int64_t position, float *restrict out)
{
    const int pairs = job->pairs, width = rounded_up(job->head_dim), rows = job->rows;
    const float scaling = job->scaling;
    /* A tile that begins with padding may start before position 0. */
    const float sign = position < 0 ? -1.0f : 1.0f;
    /* Whoever calls makes tables that reach; offsets that lie must not read beyond them. */
    const int64_t last = job->positions - 1;
    position = position > last || position < -last ? last : position < 0 ? -position : position;
    const float *ca = job->coarse_cos + position / TILE * pairs, *sa = job->coarse_sin + position / TILE * pairs;
    const float *cb = job->fine_cos + position % TILE * pairs, *sb = job->fine_sin + position % TILE * pairs;
    for (int row = 0; row < rows; row++) {
        const float *restrict q = query + (long)row * width;
        float *restrict o = out + (long)row * width;
        for (int d = 2 * pairs; d < width; d++)
            o[d] = scaling * q[d];
        for (int f = 0; f < pairs; f++) {
            const float c = scaling * (ca[f] * cb[f] - sa[f] * sb[f]), s = scaling * sign * (sa[f] * cb[f] + ca[f] * sb[f]);
            o[f] = q[f] * c + q[f + pairs] * s;
            o[f + pairs] = q[f + pairs] * c - q[f] * s;
        }
    }
}

/* out[i * TILE + t] = score of `rows` rows of queries with `tokens` keys, turned by the cosines `c` and sines `n` of
 * their places: both in one pass where the pairs fill vectors. */
static inline __attribute__((always_inline)) void score_keys(
    const int tokens, const int rows, const int pairs, const int width, const float *q, const float *k, const float *c, const float *n,
    float *out)
{
    vec sums[4][TOGETHER];
    for (int i = 0; i < rows; i++)
        for (int t = 0; t < tokens; t++)
            sums[i][t] = (vec){ 0 };
    for (int f = 0; f < pairs; f += LANES)
        for (int t = 0; t < tokens; t++) {
            const float *key = k + (long)t * width + f;
            const vec x = *(const vec *)key, y = *(const vec *)(key + pairs);
            const vec co = *(const vec *)(c + (long)t * pairs + f), si = *(const vec *)(n + (long)t * pairs + f);
            const vec first = x * co - y * si, second = y * co + x * si;
            for (int i = 0; i < rows; i++) {
                const float *own = q + (long)i * width + f;
                sums[i][t] += first * *(const vec *)own;
                sums[i][t] += second * *(const vec *)(own + pairs);
            }
        }
    for (int d = 2 * pairs; d < width; d += LANES)
        for (int t = 0; t < tokens; t++)
            for (int i = 0; i < rows; i++)
                sums[i][t] += *(const vec *)(k + (long)t * width + d) * *(const vec *)(q + (long)i * width + d);
    for (int i = 0; i < rows; i++)
        if (tokens == TOGETHER)
            store_sums(sums[i], out + (long)i * TILE);
        else
            for (int t = 0; t < tokens; t++)
                out[(long)i * TILE + t] = sum_of(sums[i][t]);
}

/* The same of any number of rows; every case has its own count of rows, so that sums are registers. */
static inline __attribute__((always_inline)) void score_rows(
    const int tokens, int rows, const int pairs, const int width, const float *q, const float *k, const float *c, const float *n, float *out)
{
    for (; rows >= 4; rows -= 4, q += 4L * width, out += 4L * TILE)
        score_keys(tokens, 4, pairs, width, q, k, c, n, out);
    switch (rows) {
    case 3: score_keys(tokens, 3, pairs, width, q, k, c, n, out); break;
    case 2: score_keys(tokens, 2, pairs, width, q, k, c, n, out); break;
    case 1: score_keys(tokens, 1, pairs, width, q, k, c, n, out); break;
    default: break;
    }
}

/* The same key turned in place, for pairs that do not fill vectors. */
static void turn_key(const int pairs, float *restrict k, const float *restrict c, const float *restrict n)
{
    for (int f = 0; f < pairs; f++) {
        const float x = k[f], y = k[f + pairs];
        k[f] = x * c[f] - y * n[f];
        k[f + pairs] = y * c[f] + x * n[f];
    }
}

/* Scores of decoded keys, which turn by their place from `low` in the tile on. */
static void score_turning(const Job *job, const Scratch *s, int low, int high, float *scores)
{
    const int pairs = job->pairs, width = rounded_up(job->head_dim), rows = job->rows;
    const float *cosines = job->fine_cos, *sines = job->fine_sin;
    int t = low;
    if (pairs % LANES == 0) {
        for (; t + TOGETHER <= high; t += TOGETHER)
            score_rows(
                TOGETHER, rows, pairs, width, s->turned, s->tile + (long)t * width, cosines + (long)t * pairs,
                sines + (long)t * pairs, scores + t);
        for (; t < high; t++)
            score_rows(
                1, rows, pairs, width, s->turned, s->tile + (long)t * width, cosines + (long)t * pairs, sines + (long)t * pairs,
                scores + t);
        return;
    }
    for (; t < high; t++) {
        float *k = s->tile + (long)t * width;
        turn_key(pairs, k, cosines + (long)t * pairs, sines + (long)t * pairs);
        for (int row = 0; row < rows; row++)
            scores[(long)row * TILE + t] = dot(width, s->turned + (long)row * width, k);
    }
}

/* The decoder of the `h`-th head of a reader. */
static Decoder8 decoder_of(const Job *job, const Reader *reader, int h)
{
    const int width = rounded_up(job->head_dim);
    const long at = (long)h * width;
    return (Decoder8){
        width, reader->exact, reader->groups, reader->matrix + at, reader->matrix_stride,
        reader->decoder + h * reader->decoder_stride, reader->scale + at, reader->bias + at, reader->stops
    };
}

/* A float16 number; 65536 and more for infinity and NaN. */
static inline float float_of(uint16_t half)
{
    union { uint32_t i; float f; } x = { .i = (uint32_t)(half & 0x7fff) << 13 };
    x.f *= 0x1p112f;
    x.i |= (uint32_t)(half & 0x8000) << 16;
    return x.f;
}

/* What the page at `data` adds to the vectors of the `h`-th head of a reader. */
static void read_mean(const Job *job, const Reader *reader, int h, const uint8_t *data, float *restrict out)
{
    const int width = rounded_up(job->head_dim);
    const int32_t *place = reader->mean_place + (long)h * width;
    const float *scale = reader->mean_scale + (long)h * width;
    uint16_t half;
    memcpy(&half, data + reader->means, sizeof half);
    const uint8_t *codes = data + reader->means + sizeof half;
    const float step = float_of(half);
    for (int d = 0; d < width; d++)
        out[d] = ((float)(codes[place[d] >> 2] >> 2 * (place[d] & 3) & 3) - 1.5f) * step * scale[d];
}

/* Codes of a reader's segment as floats. */
static const float *floats_of(const Job *job, const Reader *reader, int tokens, Scratch *s)
{
    if (s->of_floats != reader->segment)
        widen(s->codes + job->segment[reader->segment].place, tokens * (int)stride_of(job, reader), s->floats);
    s->of_floats = reader->segment;
    return s->floats;
}

static void decode_and_score(
    const Job *job, const Reader *reader, int b, const uint8_t *data, int64_t position, int low, int high, Scratch *s)
{
    const int width = rounded_up(job->head_dim), stride = (int)stride_of(job, reader), some = high - low;
    float *keys = s->tile + (long)low * width;
    for (int h = 0; h < reader->heads; h++) {
        const int head = reader->head[h];
        Decoder8 by = decoder_of(job, reader, h);
        if (reader->mean_scale) {
            read_mean(job, reader, h, data, s->mean);
            for (int d = 0; d < width; d++)
                s->mean[d] += by.bias[d];
            by.bias = s->mean;
        }
        if (by.groups)
            decode8(some, &by, s->codes + job->segment[reader->segment].place, stride, keys);
        else
            for (int d = 0; d < width; d += COLUMNS)
                rows_product(
                    some, by.exact, floats_of(job, reader, some, s), stride, by.matrix + d, (int)by.matrix_stride, by.bias + d,
                    keys + d, width);
        turn_queries(job, reader->query + ((long)b * job->heads + head) * job->rows * width, position, s->turned);
        score_turning(job, s, low, high, s->weights + (long)head * job->rows * TILE);
    }
}

/* Scores without decoding: the queries have the decoder already. */
static void score_folded(const Job *job, const Reader *reader, int b, const uint8_t *data, int low, int high, Scratch *s)
{
    const int latents = (int)latents_of(job, reader);
    const long stride = stride_of(job, reader);
    const float *codes = floats_of(job, reader, high - low, s);
    for (int h = 0; h < reader->heads; h++) {
        const long at = ((long)b * job->heads + reader->head[h]) * job->rows;
        if (reader->mean_scale)
            read_mean(job, reader, h, data, s->mean);
        for (int row = 0; row < job->rows; row++) {
            const float *q = reader->query + (at + row) * latents;
            const float mean = reader->mean_scale ? dot(job->head_dim, job->query + (at + row) * job->head_dim, s->mean) : 0;
            float *scores = s->weights + ((long)reader->head[h] * job->rows + row) * TILE;
            for (int t = low; t < high; t++)
                scores[t] = job->scaling * (dot(latents, q, codes + (t - low) * stride) + reader->constant[at + row] + mean);
        }
    }
}

/* Add a tile's codes under its weights to sums, in integers. */
static void sum_rounded(const Job *job, const Reader *reader, int tokens, Scratch *s, float *sums)
{
#if HAS_SUMS8
    const Segment *segment = job->segment + reader->segment;
    const int stride = (int)stride_of(job, reader), rows = reader->heads * job->rows, groups = (tokens + 3) / 4;
    const Weights8 *rounded = s->rounded;
    if (s->of_mixed != reader->segment)
        mix_tokens(s->codes + segment->place, tokens, stride, s->mixed);
    s->of_mixed = reader->segment;
    /* Blocks of latents outside, so that a block of the tile is read once for all rows. */
    for (int l = 0; l < stride; l += LATENTS)
        for (int first = 0; first < rows; first += ROWS8) {
            const int some = rows - first < ROWS8 ? rows - first : ROWS8;
            const Weights8 *weights[ROWS8];
            float shrink[ROWS8], *to[ROWS8];
            for (int i = 0; i < some; i++) {
                const long row = (long)reader->head[(first + i) / job->rows] * job->rows + (first + i) % job->rows;
                weights[i] = rounded + row;
                shrink[i] = s->shrink[row];
                to[i] = sums + (long)(first + i) * stride + l;
            }
            const uint8_t *mixed = s->mixed + (long)l * 4 * groups;
            switch (some) {
            case 3: add_sums8(3, mixed, groups, weights, shrink, to); break;
            case 2: add_sums8(2, mixed, groups, weights, shrink, to); break;
            default: add_sums8(1, mixed, groups, weights, shrink, to); break;
            }
        }
#else
    (void)job, (void)reader, (void)tokens, (void)s, (void)sums;
#endif
}

/* The same in floats. */
static void sum_values(const Job *job, const Reader *reader, int low, int high, Scratch *s, float *sums)
{
    const int stride = (int)stride_of(job, reader), rows = job->rows;
    const float *codes = floats_of(job, reader, high - low, s);
    for (int h = 0; h < reader->heads; h++)
        for (int row = 0; row < rows; row++) {
            const float shrink = s->shrink[(long)reader->head[h] * rows + row];
            float *own = sums + ((long)h * rows + row) * stride;
            if (shrink != 1.0f)
                for (int l = 0; l < stride; l++)
                    own[l] *= shrink;
        }
    /* Blocks of latents outside, so that a block of the tile is read once for all heads. */
    for (int l = 0; l < stride; l += COLUMNS)
        for (int h = 0; h < reader->heads; h++)
            rows_product(
                rows, high - low, s->weights + (long)reader->head[h] * rows * TILE + low, TILE, codes + l, stride, 0,
                sums + (long)h * rows * stride + l, stride);
}

/* Add a page's mean errors under the mass of a tile's weights. */
static void sum_means(const Job *job, const Reader *reader, const uint8_t *data, int low, int high, Scratch *s, float *shifts)
{
    const int width = rounded_up(job->head_dim), rows = job->rows;
    for (int h = 0; h < reader->heads; h++) {
        read_mean(job, reader, h, data, s->mean);
        for (int row = 0; row < rows; row++) {
            const long at = (long)reader->head[h] * rows + row;
            float *own = shifts + ((long)h * rows + row) * width, mass = 0;
            for (int t = low; t < high; t++)
                mass += s->weights[at * TILE + t];
            for (int d = 0; d < width; d++)
                own[d] = own[d] * s->shrink[at] + mass * s->mean[d];
        }
    }
}

/* The weights of all rows of a tile in the form that sums in integers take. */
static void round_all_weights(const Job *job, int low, int high, Scratch *s, float *mass)
{
#if HAS_SUMS8
    Weights8 *rounded = s->rounded;
    for (int row = 0; row < job->heads * job->rows; row++)
        mass[row] += round_weights(s->weights + (long)row * TILE + low, high - low, rounded + row);
#else
    (void)job, (void)low, (void)high, (void)s, (void)mass;
#endif
}

static int64_t pages_of(const Job *job) { return (job->tokens + job->page_tokens - 1) / job->page_tokens; }

/* Codes of tokens `low` to `high` of a page's segment; the same segment of the page at `next` is called for meanwhile,
 * null: there is none. A page has all layers, so that a layer's segments are too far apart for the CPU to foresee. */
static void unpack_segment(
    const Segment *segment, const uint8_t *data, const uint8_t *end, const uint8_t *next, int low, int high, uint8_t *codes)
{
    if (next) {
        const Plane *last = segment->plane + segment->planes - 1;
        const uint8_t *from = next + segment->offset, *to = from + last->offset + (long)last->rows * last->count;
        for (; from < to; from += CACHE_LINE)
            __builtin_prefetch(from);
    }
    unpack(
        data + segment->offset, end, segment->plane, segment->planes, low, high, codes + segment->place,
        (int)padded(segment->latents));
}

/* Page `page`, with `more` of this split after it. */
static void attend_page(const Job *job, int b, int split, int64_t page, int more, Scratch *s)
{
    const uint8_t *end, *other, *data = page_at(job, b, page, &end);
    const uint8_t *following = more ? page_at(job, b, page + 1, &other) : 0;
    const int all = job->heads * job->rows, in_8_bits = HAS_SUMS8 && job->sums_in_8_bits;
    const long statistics = ((long)b * (job->splits + 1) + split) * all;
    float *maximum = job->maximum + statistics, *mass = job->mass + statistics;
    const int64_t shown = job->shown ? job->shown[b * job->shown_stride + page] : job->page_tokens;
    for (int place = 0; place < job->page_tokens; place += TILE) {
        /* Of tokens that are there and attended, by place in this tile. */
        const int64_t start = page * job->page_tokens + place;
        int64_t low = job->first[b] - start, high = job->tokens - start, room = job->page_tokens - place, left = shown - place;
        low = low < 0 ? 0 : low;
        high = high < TILE ? high : TILE;
        high = high < room ? high : room;
        high = high < left ? high : left;
        if (low >= high)
            continue;
        const uint8_t *next = room > TILE ? 0 : following; /* from the page's last tile on */
        for (int i = 0; i < job->segments; i++)
            unpack_segment(job->segment + i, data, end, next, place + (int)low, place + (int)high, s->codes);
        s->of_floats = s->of_mixed = -1;
        for (int r = 0; r < job->key_readers; r++) {
            const Reader *reader = job->keys + r;
            if (reader->constant)
                score_folded(job, reader, b, data, low, high, s);
            else
                decode_and_score(job, reader, b, data, start - job->offset[b], low, high, s);
        }
        for (int row = 0; row < all; row++)
            s->shrink[row] = soften(s->weights + (long)row * TILE, low, high, job->softcap, maximum + row, mass + row);
        if (in_8_bits)
            round_all_weights(job, low, high, s, mass);
        for (int r = 0; r < job->value_readers; r++) {
            const Reader *reader = job->values + r;
            float *sums = reader->sums + ((long)b * job->splits + split) * size_of_sums(job, reader);
            if (in_8_bits)
                sum_rounded(job, reader, (int)(high - low), s, sums);
            else
                sum_values(job, reader, low, high, s, sums);
            if (reader->mean_scale)
                sum_means(job, reader, data, low, high, s, reader->shifts + ((long)b * job->splits + split) * size_of_shifts(job, reader));
        }
    }
}

static int64_t largest_stride(const Job *job)
{
    int64_t maximum = 0;
    for (int i = 0; i < job->segments; i++)
        maximum = job->segment[i].latents > maximum ? job->segment[i].latents : maximum;
    return padded(maximum);
}

static int64_t bytes_of_codes(const Job *job)
{
    int64_t bytes = 0;
    for (int i = 0; i < job->segments; i++)
        bytes += TILE * padded(job->segment[i].latents);
    return bytes + CACHE_LINE; /* what unpacking may write behind */
}

/* Lay out a thread's room at `room`; its floats. */
static int64_t lay_out_room(const Job *job, float *room, Scratch *s)
{
    const int64_t all = (int64_t)job->heads * job->rows, width = rounded_up(job->head_dim), tile = TILE * largest_stride(job);
    float *at = room;
    s->codes = (uint8_t *)at, at += bytes_of_codes(job) / 4;
    s->mixed = (uint8_t *)at, at += HAS_SUMS8 ? tile / 4 : 0;
    s->floats = at, at += tile;
    s->tile = at, at += TILE * width;
    s->turned = at, at += job->rows * width;
    s->decoded = at, at += job->rows * width;
    s->mean = at, at += width;
    s->weights = at, at += all * TILE;
    s->shrink = at, at += all;
#if HAS_SUMS8
    s->rounded = at, at += all * (int64_t)(sizeof(Weights8) / 4);
#endif
    return (at - room + LATENTS - 1) / LATENTS * LATENTS;
}

/* Everything of one split of the pages, from nothing seen. */
static void attend_split(const Job *job, int b, int split, Scratch *s)
{
    const int all = job->heads * job->rows;
    const long statistics = ((long)b * (job->splits + 1) + split) * all;
    memset(s->codes, 0, bytes_of_codes(job)); /* what lies behind a row's latents stays 0 */
    start_rows(all, job->maximum + statistics, job->mass + statistics);
    for (int r = 0; r < job->value_readers; r++) {
        const int64_t size = size_of_sums(job, job->values + r);
        memset(job->values[r].sums + ((long)b * job->splits + split) * size, 0, size * sizeof(float));
        const int64_t shifts = size_of_shifts(job, job->values + r);
        if (shifts)
            memset(job->values[r].shifts + ((long)b * job->splits + split) * shifts, 0, shifts * sizeof(float));
    }
    const int64_t pages = pages_of(job), stop = pages * (split + 1) / job->splits;
    for (int64_t page = pages * split / job->splits; page < stop; page++)
        attend_page(job, b, split, page, page + 1 < stop, s);
#if HAS_SUMS8
    for (int r = 0; r < job->value_readers && job->sums_in_8_bits; r++) {
        const int64_t size = size_of_sums(job, job->values + r);
        order_sums(job->values[r].sums + ((long)b * job->splits + split) * size, size);
    }
#endif
}

/* The same as `float_of`, with infinity and NaN as they are. */
static inline float any_float_of(uint16_t half)
{
    union { float f; uint32_t i; } x = { .f = float_of(half) };
    x.i |= (half & 0x7c00) == 0x7c00 ? 0x7f800000u : 0;
    return x.f;
}

/* One vector of an exact side as floats: as it is, or widened into `room`. */
static const float *exact_vector(const Side *side, int kind, int dim, int b, int head, int64_t token, float *room)
{
    const int64_t at = b * side->batch_stride + head * side->head_stride + token * side->token_stride;
    if (kind == FLOAT32)
        return (const float *)side->base + at;
    const uint16_t *narrow = (const uint16_t *)side->base + at;
    if (kind == FLOAT16) {
        for (int d = 0; d < dim; d++)
            room[d] = any_float_of(narrow[d]);
        return room;
    }
    for (int d = 0; d < dim; d++) {
        union { uint32_t i; float f; } wide = { .i = (uint32_t)narrow[d] << 16 };
        room[d] = wide.f;
    }
    return room;
}

/* What is kept exactly, its weighted values into `out`. */
static int attend_exact(const Job *job, int b)
{
    const int all = job->heads * job->rows, dim = job->head_dim, rows = job->rows;
    int64_t tokens = 0;
    for (int p = 0; p < job->parts; p++)
        tokens += job->part[p].tokens;
    const long statistics = ((long)b * (job->splits + 1) + job->splits) * all;
    float *maximum = job->maximum + statistics, *mass = job->mass + statistics;
    float *room = malloc(sizeof(float) * (rows * tokens + dim));
    if (!room)
        return 1;
    float *scores = room + dim;
    start_rows(all, maximum, mass);
    for (int row = 0; job->sinks && row < all; row++) {
        maximum[row] = job->sinks[row];
        mass[row] = 1;
    }
    for (int head = 0; head < job->heads; head++) {
        const long at = ((long)b * job->heads + head) * rows;
        int64_t token = 0;
        for (int p = 0; p < job->parts; p++)
            for (int64_t t = 0; t < job->part[p].tokens; t++, token++) {
                const float *k = exact_vector(&job->part[p].keys, job->part[p].kind, dim, b, head, t, room);
                for (int row = 0; row < rows; row++)
                    scores[row * tokens + token] = job->scaling * dot(dim, job->query + (at + row) * dim, k);
            }
        for (int row = 0; row < rows; row++) {
            const uint8_t *mask = job->mask ? job->mask + b * job->mask_batch_stride + row % job->mask_rows * job->mask_row_stride : 0;
            soften_masked(scores + row * tokens, tokens, mask, job->mask_token_stride, job->softcap, maximum + head * rows + row, mass + head * rows + row);
        }
        memset(job->out + at * dim, 0, sizeof(float) * rows * dim);
        token = 0;
        for (int p = 0; p < job->parts; p++)
            for (int64_t t = 0; t < job->part[p].tokens; t++, token++) {
                const float *v = exact_vector(&job->part[p].values, job->part[p].kind, dim, b, head, t, room);
                for (int row = 0; row < rows; row++) {
                    const float weight = scores[row * tokens + token];
                    float *o = job->out + (at + row) * dim;
                    for (int d = 0; d < dim; d++)
                        o[d] += weight * v[d];
                }
            }
    }
    free(room);
    return 0;
}

/* to[heads * rows][stride] = to mine + (what lies `other` behind) theirs, by the rows of all heads. */
static void merge_sums(
    const Job *job, const Reader *reader, long stride, float *to, long other, const float *mine, const float *theirs)
{
    for (int h = 0; h < reader->heads; h++)
        for (int row = 0; row < job->rows; row++) {
            const long at = ((long)h * job->rows + row) * stride, place = (long)reader->head[h] * job->rows + row;
            for (int l = 0; l < stride; l++)
                to[at + l] = to[at + l] * mine[place] + to[other + at + l] * theirs[place];
        }
}

/* Bring the sums of all splits of a sequence to one maximum and add them up in the first split's place. */
static void merge(const Job *job, int b)
{
    const int all = job->heads * job->rows, splits = job->splits;
    float *maximum = job->maximum + (long)b * (splits + 1) * all, *mass = job->mass + (long)b * (splits + 1) * all;
    for (int split = 1; split < splits; split++) {
        for (int row = 0; row < all; row++) {
            const long other = (long)split * all + row;
            const float top = maximum[row] > maximum[other] ? maximum[row] : maximum[other];
            const float mine = exp_of(maximum[row] - top), theirs = exp_of(maximum[other] - top);
            maximum[row] = top;
            mass[row] = mass[row] * mine + mass[other] * theirs;
            /* Kept for the sums below. */
            maximum[other] = theirs;
            mass[other] = mine;
        }
        for (int r = 0; r < job->value_readers; r++) {
            const Reader *reader = job->values + r;
            const float *mine = mass + (long)split * all, *theirs = maximum + (long)split * all;
            const int64_t size = size_of_sums(job, reader), shifts = size_of_shifts(job, reader);
            merge_sums(job, reader, stride_of(job, reader), reader->sums + (long)b * splits * size, split * size, mine, theirs);
            if (shifts)
                merge_sums(
                    job, reader, rounded_up(job->head_dim), reader->shifts + (long)b * splits * shifts, split * shifts, mine, theirs);
        }
    }
}

/* Decode the summed values of one head into [rows][padded head dim]. */
static void decode_sums(const Job *job, const Reader *reader, int b, int h, const float *mass, float *decoded)
{
    const int width = rounded_up(job->head_dim), stride = (int)stride_of(job, reader), rows = job->rows;
    const float *sums = reader->sums + ((long)b * job->splits * reader->heads + h) * rows * stride;
    const Decoder8 by = decoder_of(job, reader, h);
    const float *shifts = reader->mean_scale ? reader->shifts + ((long)b * job->splits * reader->heads + h) * rows * width : 0;
    for (int row = 0; row < rows; row++)
        for (int d = 0; d < width; d++)
            decoded[(long)row * width + d] = mass[row] * by.bias[d] + (shifts ? shifts[(long)row * width + d] : 0);
    for (int d = 0; d < width; d += COLUMNS)
        rows_product(rows, by.exact, sums, stride, by.matrix + d, (int)by.matrix_stride, 0, decoded + d, width);
    if (by.groups)
        decode8_sums(rows, &by, (int)latents_of(job, reader) - by.exact, sums + by.exact, stride, decoded);
}

/* Decode the summed values, add the exact ones, divide by the mass; a row that saw nothing is 0. */
static void finish(const Job *job, int b, float *decoded)
{
    const int all = job->heads * job->rows, width = rounded_up(job->head_dim), rows = job->rows, dim = job->head_dim;
    const float *maximum = job->maximum + (long)b * (job->splits + 1) * all, *mass = job->mass + (long)b * (job->splits + 1) * all;
    const float *exact_most = maximum + (long)job->splits * all, *exact_mass = mass + (long)job->splits * all;
    for (int r = 0; r < job->value_readers; r++)
        for (int h = 0; h < job->values[r].heads; h++) {
            const long first = (long)job->values[r].head[h] * rows;
            decode_sums(job, job->values + r, b, h, mass + first, decoded);
            for (int row = 0; row < rows; row++) {
                const long at = first + row;
                const float top = maximum[at] > exact_most[at] ? maximum[at] : exact_most[at];
                const float paged = exp_of(maximum[at] - top), exact = exp_of(exact_most[at] - top);
                const float total = mass[at] * paged + exact_mass[at] * exact;
                float *o = job->out + ((long)b * all + at) * dim;
                for (int d = 0; d < dim; d++)
                    /* NaN stays NaN. */
                    o[d] = total == 0 ? 0 : (decoded[(long)row * width + d] * paged + o[d] * exact) / total;
            }
        }
}

/* Lay out the scratch of a call at `scratch`; its floats. */
static int64_t lay_out(Job *job, float *scratch)
{
    const int64_t statistics = (int64_t)job->batch * (job->splits + 1) * job->heads * job->rows;
    float *at = scratch;
    Scratch unused;
    int64_t place = 0;
    for (int i = 0; i < job->segments; i++) {
        job->segment[i].place = place;
        place += TILE * padded(job->segment[i].latents);
    }
    job->room = lay_out_room(job, scratch, &unused);
    job->rooms = at, at += job->threads * job->room;
    for (int r = 0; r < job->value_readers; r++) {
        Reader *reader = job->values + r;
        reader->sums = at, at += (int64_t)job->batch * job->splits * size_of_sums(job, reader);
        reader->shifts = at, at += (int64_t)job->batch * job->splits * size_of_shifts(job, reader);
    }
    for (int r = 0; r < job->key_readers + job->value_readers; r++) {
        Reader *reader = r < job->key_readers ? job->keys + r : job->values + r - job->key_readers;
        if (reader->half)
            reader->matrix = at, at += reader->exact * (int64_t)reader->heads * rounded_up(job->head_dim);
    }
    job->maximum = at, at += statistics;
    job->mass = at, at += statistics;
    return at - scratch;
}

static void widen_halves(Reader *reader, int width)
{
    const long row = (long)reader->heads * width;
    float *to = (float *)reader->matrix;
    for (int e = 0; e < reader->exact && reader->half; e++)
        for (long i = 0; i < row; i++)
            to[e * row + i] = float_of(reader->half[e * reader->half_stride + i]);
}

int kvcar_columns(void) { return COLUMNS; }

/* Floats that a call needs beside its inputs and output. */
int64_t kvcar_scratch(Job *job) { return lay_out(job, 0); }

/* The `i`-th of the splits of all sequences, the last of each being what is kept exactly. */
static int attend_part(const void *context, int64_t i, int worker)
{
    const Job *job = context;
    const int b = (int)(i / (job->splits + 1)), split = (int)(i % (job->splits + 1));
    if (split == job->splits)
        return attend_exact(job, b);
    Scratch own;
    lay_out_room(job, job->rooms + worker * job->room, &own);
    attend_split(job, b, split, &own);
    return 0;
}

/* Attention into `out`; 0, or 1 where memory is missing. */
int kvcar_attend(Job *job)
{
    lay_out(job, job->scratch);
    for (int r = 0; r < job->key_readers; r++)
        widen_halves(job->keys + r, rounded_up(job->head_dim));
    for (int r = 0; r < job->value_readers; r++)
        widen_halves(job->values + r, rounded_up(job->head_dim));
    if (in_parallel(job->threads, (int64_t)job->batch * (job->splits + 1), attend_part, job))
        return 1;
    Scratch own;
    lay_out_room(job, job->rooms, &own);
    for (int b = 0; b < job->batch; b++) {
        merge(job, b);
        finish(job, b, own.decoded);
    }
    return 0;
}
