/* Jobs split among the threads of torch's own OpenMP runtime.
 *
 * It is called by the name that GCC's has for it, and LLVM's and Intel's have as well. A pragma compiled by clang would
 * ask for LLVM's runtime instead, which may not be installed and whose threads would run beside torch's. Nothing is
 * linked: torch has loaded its runtime for all to see. */
#ifndef KVCAR_PARALLEL_H
#define KVCAR_PARALLEL_H

#include <stdint.h>

void GOMP_parallel(void (*run)(void *), void *data, unsigned threads, unsigned flags);

/* `next` is the first job that no thread has taken, `workers` how many threads have begun. */
typedef struct {
    int (*job)(const void *context, int64_t i, int worker);
    const void *context;
    int64_t jobs, next;
    int workers, failed;
} Work;

/* What each thread does: one job after another. */
static void take_jobs(void *data)
{
    Work *work = data;
    const int worker = __atomic_fetch_add(&work->workers, 1, __ATOMIC_RELAXED);
    int failed = 0;
    for (int64_t i; (i = __atomic_fetch_add(&work->next, 1, __ATOMIC_RELAXED)) < work->jobs;)
        failed |= work->job(work->context, i, worker);
    __atomic_fetch_or(&work->failed, failed, __ATOMIC_RELAXED);
}

/* Call `job` for 0 to `jobs`, with the number of its thread below `threads`; 0, or what is not 0 of what it returned. All
 * is done, and seen by the caller, when this returns. */
static int in_parallel(int threads, int64_t jobs, int (*job)(const void *context, int64_t i, int worker), const void *context)
{
    Work work = { job, context, jobs, 0, 0, 0 };
    GOMP_parallel(take_jobs, &work, (unsigned)threads, 0);
    return work.failed;
}

#endif
