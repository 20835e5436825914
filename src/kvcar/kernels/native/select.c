/* Which pages a decode step attends to, by one vector a page and KV head: scores, a softmax over pages as every query row's
 * vote, and the pages with most votes in ascending order. See kernels/select/naive.py.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "half.h"
#include "softmax.h"
#include "tile.h"

#define HIDDEN (-1.0f) /* votes of a page that is hidden: less than none */

/* Scores [rows][pages] of one KV head: queries [rows][dim] and vectors [pages][dim]. */
static void score_pages(
    const int rows, const int64_t pages, const int dim, const float *query, const uint16_t *vectors, const float scaling, float *room,
    float *scores)
{
    for (int64_t page = 0; page < pages; page++) {
        floats_of_halves(vectors + page * dim, dim, room);
        for (int row = 0; row < rows; row++)
            scores[row * pages + page] = scaling * dot(dim, query + (long)row * dim, room);
    }
}

/* The votes of one row are added; those of scores that are no numbers count as none. */
static void vote(const int64_t hidden, const int64_t pages, float *scores, float *votes)
{
    float most = NOTHING, mass = 0;
    soften(scores, hidden, pages, 0.0f, &most, &mass);
    if (!(mass > 0))
        return;
    for (int64_t page = hidden; page < pages; page++)
        votes[page] += scores[page] / mass;
}

/* The `count`th largest of `votes`, which are put in another order. */
static float threshold_of(const int64_t count, int64_t pages, float *votes)
{
    int64_t low = 0, high = pages - 1;
    while (low < high) {
        const float pivot = votes[low + (high - low) / 2];
        int64_t i = low, j = high;
        while (i <= j) {
            while (votes[i] > pivot)
                i++;
            while (votes[j] < pivot)
                j--;
            if (i <= j) {
                const float swapped = votes[i];
                votes[i++] = votes[j];
                votes[j--] = swapped;
            }
        }
        if (count - 1 <= j)
            high = j;
        else if (count - 1 >= i)
            low = i;
        else
            break;
    }
    return votes[count - 1];
}

/* The `count` pages with most votes, ascending; of equal ones the first. `room` has space for the votes. */
static void take_most(const int64_t count, const int64_t pages, const float *votes, float *room, int64_t *out)
{
    if (count == 0)
        return;
    memcpy(room, votes, sizeof(float) * pages);
    const float threshold = threshold_of(count, pages, room);
    int64_t equal = count;
    for (int64_t page = 0; page < pages; page++)
        equal -= votes[page] > threshold;
    for (int64_t page = 0; page < pages; page++)
        if (votes[page] > threshold || (votes[page] == threshold && equal-- > 0))
            *out++ = page;
}

/* Pages [batch][most] into `out`: `most - with_next` of the first `pages`, and page `pages` where `with_next`.
 *
 * `query` [batch][heads][rows][dim]; `vectors` float16 [batch][heads][pages][dim], those of a head side by side, by strides in
 * elements; `hidden` [batch], how many of the first pages hold nothing. Returns 0, or 1 where memory is missing. */
int kvcar_select(
    int32_t batch, int32_t heads, int32_t rows, int32_t dim, int64_t pages, const float *query, const uint16_t *vectors,
    int64_t batch_stride, int64_t head_stride, float scaling, int32_t most, const int64_t *hidden, int32_t with_next, int64_t *out)
{
    float *votes = malloc(sizeof(float) * (pages * (rows + 1) + dim));
    if (!votes)
        return 1;
    float *scores = votes + pages, *room = scores + pages * rows;
    for (int b = 0; b < batch; b++) {
        const int64_t own = hidden[b] < 0 ? 0 : hidden[b] < pages ? hidden[b] : pages;
        for (int64_t page = 0; page < pages; page++)
            votes[page] = page < own ? HIDDEN : 0.0f;
        for (int h = 0; h < heads; h++) {
            score_pages(
                rows, pages, dim, query + ((long)b * heads + h) * rows * dim, vectors + b * batch_stride + h * head_stride, scaling,
                room, scores);
            for (int row = 0; row < rows; row++)
                vote(own, pages, scores + row * pages, votes);
        }
        for (int64_t page = 0; page < pages; page++)
            votes[page] = votes[page] == votes[page] ? votes[page] : 0.0f;
        take_most(most - with_next, pages, votes, scores, out + (long)b * most);
        if (with_next)
            out[(long)b * most + most - 1] = pages;
    }
    free(votes);
    return 0;
}
