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

#define TILE 64
#define CACHE_LINE 64

/* How a segment of the page gives some heads.
 *
 * Keys that rotate: `matrix` is [heads][blocks of COLUMNS][exact latents][COLUMNS], `bias` [heads][padded head dim],
 * `query` [batch][heads of the layer][rows][padded head dim], unscaled, all in the order (first of each rotated pair,
 * second, the rest).
 * Or, where `narrow` is given, `matrix` is [heads][exact latents][padded head dim] and the decoder of the latents after
 * those is `narrow` [heads][groups of DECODE8_LATENTS latents][padded head dim][DECODE8_LATENTS] times `scale`
 * [heads][padded head dim]; `stops` [heads][stops_stride], count first: see decode8.h.
 * Keys that do not rotate: `matrix` is null, `query` [batch][heads of the layer][rows][latents] holds the decoder
 * already and `constant` [batch][heads of the layer][rows] is what its bias adds to a score.
 * Values: `matrix` [heads][latents][padded head dim], `bias` [heads][padded head dim]; `sums` [batch][splits][heads *
 * rows][padded latents] is written. */
typedef struct {
    int64_t offset; /* bytes into the page */
    int32_t latents, planes, heads, exact, stops_stride, spare;
    const Plane *plane;
    const int32_t *head;
    const float *matrix, *bias;
    const int8_t *narrow;
    const float *scale;
    const int32_t *stops;
    const float *query, *constant;
    float *sums;
} Reader;

typedef struct {
    const uint8_t *base;
    int64_t batch_stride, page_stride, pages, page_bytes;
} Arena;

/* Tokens kept exactly: [batch][heads][tokens][head dim] by strides in elements, of float or bfloat16. */
typedef struct {
    const void *base;
    int64_t batch_stride, head_stride, token_stride;
} Side;

typedef struct {
    Side keys, values;
    int64_t tokens;
    int32_t is_bfloat16, spare;
} Part;

typedef struct {
    int32_t batch, heads, rows, head_dim, page_tokens, pairs, splits, threads;
    int64_t tokens, positions; /* in pages; that the tables of angles reach */
    const int64_t *first, *offset; /* [batch]: first token attended; position of token 0 is -offset */
    const float *fine_cos, *fine_sin, *coarse_cos, *coarse_sin; /* [TILE or more][pairs] each */
    float scaling, softcap;                                     /* on scores; 0 for no cap */
    int32_t key_readers, value_readers, arenas;
    const Reader *keys, *values;
    const Arena *arena;
    float *maximum, *mass;                             /* [batch][splits + 1][heads * rows], the last of what is exact */
    const float *query;                                /* [batch][heads][rows][head dim] in the model's order */
    const Part *part;                                  /* tokens kept exactly, one part after the other */
    const uint8_t *mask;                               /* null: all may be attended */
    int64_t mask_batch_stride, mask_row_stride, mask_token_stride;
    int32_t mask_rows, parts;                          /* row r of the queries has row r % mask_rows of the mask */
    float *out;                                        /* [batch][heads][rows][head dim]; has exact sums meanwhile */
} Job;

typedef struct {
    uint8_t *codes;  /* of a segment, [TILE][padded latents] from the tile's first token that is attended, and room behind */
    float *floats;   /* the same as floats */
    float *tile;     /* decoded keys, [TILE][padded head dim] */
    float *turned;   /* queries rotated to the tile's start, [rows][padded head dim] */
    float *weights;  /* [heads * rows][TILE] scores, then weights */
    float *shrink;   /* [heads * rows] */
} Scratch;

/* Where a page begins and, in `end`, where it ends. */
static const uint8_t *page_at(const Job *job, int b, int64_t page, const uint8_t **end)
{
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

/* Keys of one head by its decoder in 8 bits. */
static void decode_narrow(
    const Reader *reader, int h, int tokens, int width, const uint8_t *codes, int stride, const float *matrix, const float *bias,
    float *keys)
{
#if DECODE8_LATENTS
    const int groups = (reader->latents - reader->exact + DECODE8_LATENTS - 1) / DECODE8_LATENTS;
    const int8_t *decoder = reader->narrow + (long)h * groups * DECODE8_LATENTS * width;
    const int32_t *stops = reader->stops + (long)h * reader->stops_stride;
    const float *scale = reader->scale + (long)h * width;
    const Decoder8 by = { width, reader->exact, groups, matrix, decoder, scale, bias, stops[0], stops + 1 };
    decode8(tokens, &by, codes, stride, keys);
#else
    (void)reader, (void)h, (void)tokens, (void)width, (void)codes, (void)stride, (void)matrix, (void)bias, (void)keys;
#endif
}

static void decode_and_score(const Job *job, const Reader *reader, int b, int64_t position, int low, int high, Scratch *s)
{
    const int width = rounded_up(job->head_dim), stride = rounded_up(reader->latents), some = high - low;
    float *keys = s->tile + (long)low * width;
    if (!reader->narrow)
        widen(s->codes, some * stride, s->floats);
    for (int h = 0; h < reader->heads; h++) {
        const int head = reader->head[h];
        const float *bias = reader->bias + (long)h * width, *matrix = reader->matrix + (long)h * width * reader->exact;
        if (reader->narrow)
            decode_narrow(reader, h, some, width, s->codes, stride, matrix, bias, keys);
        else
            for (int d = 0; d < width; d += COLUMNS)
                rows_product(
                    some, reader->exact, s->floats, stride, matrix + (long)d * reader->exact, COLUMNS, bias + d, keys + d, width);
        turn_queries(job, reader->query + ((long)b * job->heads + head) * job->rows * width, position, s->turned);
        score_turning(job, s, low, high, s->weights + (long)head * job->rows * TILE);
    }
}

/* Scores without decoding: the queries have the decoder already. */
static void score_folded(const Job *job, const Reader *reader, int b, int low, int high, Scratch *s)
{
    const int latents = reader->latents, stride = rounded_up(latents);
    widen(s->codes, (high - low) * stride, s->floats);
    for (int h = 0; h < reader->heads; h++) {
        const long at = ((long)b * job->heads + reader->head[h]) * job->rows;
        for (int row = 0; row < job->rows; row++) {
            const float *q = reader->query + (at + row) * latents;
            float *scores = s->weights + ((long)reader->head[h] * job->rows + row) * TILE;
            for (int t = low; t < high; t++) {
                scores[t] = job->scaling * (dot(latents, q, s->floats + (long)(t - low) * stride) + reader->constant[at + row]);
            }
        }
    }
}

static void sum_values(const Job *job, const Reader *reader, int low, int high, Scratch *s, float *sums)
{
    const int stride = rounded_up(reader->latents), rows = job->rows;
    widen(s->codes, (high - low) * stride, s->floats);
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
                rows, high - low, s->weights + (long)reader->head[h] * rows * TILE + low, TILE, s->floats + l, stride, 0,
                sums + (long)h * rows * stride + l, stride);
}

static int64_t pages_of(const Job *job) { return (job->tokens + job->page_tokens - 1) / job->page_tokens; }

/* Codes of tokens `low` to `high` of a page's segment; the same segment of the page at `next` is called for meanwhile,
 * null: there is none. A page has all layers, so that a layer's segments are too far apart for the CPU to foresee. */
static void unpack_segment(
    const Reader *reader, const uint8_t *data, const uint8_t *end, const uint8_t *next, int low, int high, uint8_t *codes)
{
    if (next) {
        const Plane *last = reader->plane + reader->planes - 1;
        const uint8_t *from = next + reader->offset, *to = from + last->offset + (long)last->rows * last->count;
        for (; from < to; from += CACHE_LINE)
            __builtin_prefetch(from);
    }
    unpack(data + reader->offset, end, reader->plane, reader->planes, low, high, codes, rounded_up(reader->latents));
}

/* Page `page`, with `more` of this split after it. */
static void attend_page(const Job *job, int b, int split, int64_t page, int more, Scratch *s)
{
    const uint8_t *end, *other, *data = page_at(job, b, page, &end);
    const uint8_t *following = more ? page_at(job, b, page + 1, &other) : 0;
    const int all = job->heads * job->rows;
    const long statistics = ((long)b * (job->splits + 1) + split) * all;
    float *maximum = job->maximum + statistics, *mass = job->mass + statistics;
    for (int place = 0; place < job->page_tokens; place += TILE) {
        /* Of tokens that are there and attended, by place in this tile. */
        const int64_t start = page * job->page_tokens + place;
        int64_t low = job->first[b] - start, high = job->tokens - start, room = job->page_tokens - place;
        low = low < 0 ? 0 : low;
        high = high < TILE ? high : TILE;
        high = high < room ? high : room;
        if (low >= high)
            continue;
        const uint8_t *next = room > TILE ? 0 : following; /* from the page's last tile on */
        const int from = place + (int)low, to = place + (int)high;
        for (int r = 0; r < job->key_readers; r++) {
            const Reader *reader = job->keys + r;
            unpack_segment(reader, data, end, next, from, to, s->codes);
            if (reader->query && !reader->constant)
                decode_and_score(job, reader, b, start - job->offset[b], low, high, s);
            else
                score_folded(job, reader, b, low, high, s);
        }
        for (int row = 0; row < all; row++)
            s->shrink[row] = soften(s->weights + (long)row * TILE, low, high, job->softcap, maximum + row, mass + row);
        for (int r = 0; r < job->value_readers; r++) {
            const Reader *reader = job->values + r;
            const long size = (long)reader->heads * job->rows * rounded_up(reader->latents);
            unpack_segment(reader, data, end, next, from, to, s->codes);
            sum_values(job, reader, low, high, s, reader->sums + ((long)b * job->splits + split) * size);
        }
    }
}

static long largest_latents(const Job *job)
{
    int maximum = 1;
    for (int r = 0; r < job->key_readers; r++)
        maximum = job->keys[r].latents > maximum ? job->keys[r].latents : maximum;
    for (int r = 0; r < job->value_readers; r++)
        maximum = job->values[r].latents > maximum ? job->values[r].latents : maximum;
    return rounded_up(maximum);
}

/* Everything of one split of the pages, from nothing seen. */
static int attend_split(const Job *job, int b, int split)
{
    const int all = job->heads * job->rows, width = rounded_up(job->head_dim);
    const long codes = TILE * largest_latents(job), floats = codes, tile = (long)TILE * width, turned = (long)job->rows * width;
    const long weights = (long)all * TILE;
    float *room = calloc(codes / 4 + COLUMNS + floats + tile + turned + weights + all, sizeof(float));
    if (!room)
        return 1;
    Scratch s;
    s.floats = room;
    s.tile = s.floats + floats;
    s.turned = s.tile + tile;
    s.weights = s.turned + turned;
    s.shrink = s.weights + weights;
    s.codes = (uint8_t *)(s.shrink + all);
    const long statistics = ((long)b * (job->splits + 1) + split) * all;
    start_rows(all, job->maximum + statistics, job->mass + statistics);
    for (int r = 0; r < job->value_readers; r++) {
        const long size = (long)job->values[r].heads * job->rows * rounded_up(job->values[r].latents);
        memset(job->values[r].sums + ((long)b * job->splits + split) * size, 0, size * sizeof(float));
    }
    const int64_t pages = pages_of(job), stop = pages * (split + 1) / job->splits;
    for (int64_t page = pages * split / job->splits; page < stop; page++)
        attend_page(job, b, split, page, page + 1 < stop, &s);
    free(room);
    return 0;
}

/* One vector of an exact side as floats: as it is, or widened into `room`. */
static const float *exact_vector(const Side *side, int is_bfloat16, int dim, int b, int head, int64_t token, float *room)
{
    const int64_t at = b * side->batch_stride + head * side->head_stride + token * side->token_stride;
    if (!is_bfloat16)
        return (const float *)side->base + at;
    const uint16_t *narrow = (const uint16_t *)side->base + at;
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
    for (int head = 0; head < job->heads; head++) {
        const long at = ((long)b * job->heads + head) * rows;
        int64_t token = 0;
        for (int p = 0; p < job->parts; p++)
            for (int64_t t = 0; t < job->part[p].tokens; t++, token++) {
                const float *k = exact_vector(&job->part[p].keys, job->part[p].is_bfloat16, dim, b, head, t, room);
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
                const float *v = exact_vector(&job->part[p].values, job->part[p].is_bfloat16, dim, b, head, t, room);
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
            const int stride = rounded_up(reader->latents);
            const long size = (long)reader->heads * job->rows * stride;
            float *to = reader->sums + (long)b * splits * size, *from = to + split * size;
            for (int h = 0; h < reader->heads; h++)
                for (int row = 0; row < job->rows; row++) {
                    const long at = ((long)h * job->rows + row) * stride, place = (long)split * all + (long)reader->head[h] * job->rows + row;
                    for (int l = 0; l < reader->latents; l++)
                        to[at + l] = to[at + l] * mass[place] + from[at + l] * maximum[place];
                }
        }
    }
}

/* Decode the summed values, add the exact ones, divide by the mass; a row that saw nothing is 0. */
static int finish(const Job *job, int b)
{
    const int all = job->heads * job->rows, width = rounded_up(job->head_dim), rows = job->rows, dim = job->head_dim;
    const float *maximum = job->maximum + (long)b * (job->splits + 1) * all, *mass = job->mass + (long)b * (job->splits + 1) * all;
    const float *exact_most = maximum + (long)job->splits * all, *exact_mass = mass + (long)job->splits * all;
    float *decoded = malloc(sizeof(float) * rows * width);
    if (!decoded)
        return 1;
    for (int r = 0; r < job->value_readers; r++) {
        const Reader *reader = job->values + r;
        const int stride = rounded_up(reader->latents);
        const float *sums = reader->sums + (long)b * job->splits * reader->heads * rows * stride;
        for (int h = 0; h < reader->heads; h++) {
            const long first = (long)reader->head[h] * rows;
            for (int row = 0; row < rows; row++)
                for (int d = 0; d < width; d++)
                    decoded[(long)row * width + d] = mass[first + row] * reader->bias[(long)h * width + d];
            for (int d = 0; d < width; d += COLUMNS)
                rows_product(
                    rows, reader->latents, sums + (long)h * rows * stride, stride,
                    reader->matrix + (long)h * reader->latents * width + d, width, 0, decoded + d, width);
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
    free(decoded);
    return 0;
}

int kvcar_columns(void) { return COLUMNS; }
int kvcar_decode8_latents(void) { return DECODE8_LATENTS; }

/* The `i`-th of the splits of all sequences, the last of each being what is kept exactly. */
static int attend_part(const void *context, int64_t i)
{
    const Job *job = context;
    const int b = (int)(i / (job->splits + 1)), split = (int)(i % (job->splits + 1));
    return split < job->splits ? attend_split(job, b, split) : attend_exact(job, b);
}

/* Attention into `out`; 0, or 1 where memory is missing. */
int kvcar_attend(const Job *job)
{
    int failed = in_parallel(job->threads, (int64_t)job->batch * (job->splits + 1), attend_part, job);
    for (int b = 0; b < job->batch && !failed; b++) {
        merge(job, b);
        failed |= finish(job, b);
    }
    return failed;
}
