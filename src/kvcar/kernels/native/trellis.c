/* The search of a trellis for the levels nearest to a page's latents; kernels/trellis says what it is. */
#include <stdlib.h>

#include "parallel.h"
#include "tile.h"

#define STATES 8
#define UNREACHED 1e30f

/* Pages [pages][tokens][latents]; `states` [pages][latents] where each trellis begins, or null. */
typedef struct {
    const float *targets, *highest;
    const uint8_t *states;
    float *levels;
    int64_t pages;
    int32_t tokens, latents, threads, spare;
} Search;

/* Of LANES latents: which of the two ways into each state was the better one, a bit for each state. */
typedef struct {
    int32_t ways[LANES];
} Decisions;

/* The nearest level with `lowest` for its two lowest bits, `quarters` being how many fours the highest one has. */
static inline float nearest(float target, float lowest, float quarters)
{
    float q = (target - lowest) * 0.25f + 0.5f;
    q = q > 0 ? q : 0;
    q = q < quarters ? q : quarters;
    return 4 * (float)(int32_t)q + lowest;
}

/* Costs of all states after one more token, from those before it. */
static inline __attribute__((always_inline)) void step(
    const float *target, float quarters[4][LANES], float before[STATES][LANES], float after[STATES][LANES], Decisions *decisions)
{
    float errors[4][LANES];
    for (int lowest = 0; lowest < 4; lowest++)
        for (int lane = 0; lane < LANES; lane++) {
            const float error = nearest(target[lane], (float)lowest, quarters[lowest][lane]) - target[lane];
            errors[lowest][lane] = error * error;
        }
    for (int lane = 0; lane < LANES; lane++)
        decisions->ways[lane] = 0;
    for (int state = 0; state < STATES; state++) {
        const int flip = (state & 1) ^ (state >> 1 & 1), half = state >> 2 & 1;
        const float *zero = before[state >> 1], *one = before[state >> 1 | 4];
        const float *by_zero = errors[2 * flip + half], *by_one = errors[2 * !flip + half];
        for (int lane = 0; lane < LANES; lane++) {
            const float a = zero[lane] + by_zero[lane], b = one[lane] + by_one[lane];
            after[state][lane] = b < a ? b : a;
            decisions->ways[lane] |= (b < a) << state;
        }
    }
}

/* Search for `count` latents, LANES at most, of one page. */
static void search_lanes(const Search *s, int64_t page, int first, int count, Decisions *decisions)
{
    const int64_t start = page * s->tokens * s->latents + first;
    float quarters[4][LANES], target[LANES], costs[2][STATES][LANES];
    int32_t states[LANES];
    for (int lane = 0; lane < LANES; lane++) {
        const float highest = lane < count ? s->highest[first + lane] : 3;
        for (int lowest = 0; lowest < 4; lowest++)
            quarters[lowest][lane] = (float)(int32_t)((highest - (float)lowest) * 0.25f);
        const int begin = s->states && lane < count ? s->states[page * s->latents + first + lane] & 7 : 0;
        for (int state = 0; state < STATES; state++)
            costs[0][state][lane] = state == begin ? 0 : UNREACHED;
        target[lane] = 0;
    }
    for (int t = 0; t < s->tokens; t++) {
        const float *from = s->targets + start + (int64_t)t * s->latents;
        for (int lane = 0; lane < count; lane++)
            target[lane] = from[lane];
        step(target, quarters, costs[t & 1], costs[(t + 1) & 1], decisions + t);
    }
    for (int lane = 0; lane < LANES; lane++) {
        float least = costs[s->tokens & 1][0][lane];
        states[lane] = 0;
        for (int state = 1; state < STATES; state++)
            if (costs[s->tokens & 1][state][lane] < least)
                least = costs[s->tokens & 1][state][lane], states[lane] = state;
    }
    for (int t = s->tokens - 1; t >= 0; t--) {
        const int64_t at = start + (int64_t)t * s->latents;
        for (int lane = 0; lane < count; lane++) {
            const int state = states[lane], third = decisions[t].ways[lane] >> state & 1;
            const int lowest = 2 * ((state ^ state >> 1 ^ third) & 1) + (state >> 2 & 1);
            s->levels[at + lane] = nearest(s->targets[at + lane], (float)lowest, quarters[lowest][lane]);
            states[lane] = state >> 1 | third << 2;
        }
    }
}

static int search_page(const void *search, int64_t page, int worker)
{
    (void)worker;
    const Search *s = search;
    Decisions *decisions = malloc((size_t)s->tokens * sizeof *decisions);
    if (!decisions)
        return 1;
    for (int first = 0; first < s->latents; first += LANES)
        search_lanes(s, page, first, s->latents - first < LANES ? s->latents - first : LANES, decisions);
    free(decisions);
    return 0;
}

/* Levels of all pages; 0, or 1 where memory is missing. */
int kvcar_search_trellis(const Search *s) { return in_parallel(s->threads, s->pages, search_page, s); }
