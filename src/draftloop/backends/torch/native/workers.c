/* Threads that share a job's tasks. Must not know what the tasks do. */
#include "kernels.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>

#define SPINS 2000 /* pauses before a worker sleeps, about 0.1 ms: kernels of one step follow sooner */

/* Tasks are taken one by one, so a worker that is late, or put aside by a busy machine, holds nobody up but
 * for the task in its hands. `gate` counts the workers inside a job; its upper bit says that one is open. */
#define OPEN (1u << 31)

static struct {
    pthread_mutex_t caller, lock;
    pthread_cond_t wake;
    atomic_uint gate, job, sleepers;
    atomic_long next;
    long count;
    Task task;
    void *arguments;
    int workers;
} pool = {.caller = PTHREAD_MUTEX_INITIALIZER, .lock = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER};

static void take_tasks(void) {
    for (long i; (i = atomic_fetch_add(&pool.next, 1)) < pool.count;) pool.task(pool.arguments, i);
}

/* Whether a job is open that this worker has not been in. */
static int wanted(unsigned seen) { return (atomic_load(&pool.gate) & OPEN) && atomic_load(&pool.job) != seen; }

static void *work(void *unused) {
    unsigned seen = 0;
    for (;;) {
        for (int i = 0; i < SPINS && !wanted(seen); i++) _mm_pause();
        if (!wanted(seen)) {
            pthread_mutex_lock(&pool.lock);
            atomic_fetch_add(&pool.sleepers, 1);
            while (!wanted(seen)) pthread_cond_wait(&pool.wake, &pool.lock);
            atomic_fetch_sub(&pool.sleepers, 1);
            pthread_mutex_unlock(&pool.lock);
        }
        unsigned gate = atomic_load(&pool.gate);
        if (!(gate & OPEN) || !atomic_compare_exchange_strong(&pool.gate, &gate, gate + 1)) continue;
        seen = atomic_load(&pool.job);
        take_tasks();
        atomic_fetch_sub(&pool.gate, 1);
    }
    return unused;
}

/* Start workers, once; later calls change nothing. Returns how many threads compute, the caller included. */
int dl_start(int threads) {
    pthread_mutex_lock(&pool.caller);
    while (pool.workers < threads - 1) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, work, NULL)) break;
        pthread_detach(thread);
        pool.workers++;
    }
    int found = pool.workers + 1;
    pthread_mutex_unlock(&pool.caller);
    return found;
}

void dl_run(Task task, void *arguments, long count) {
    /* A second caller computes alone, rather than wait. */
    if (count == 1 || !pool.workers || pthread_mutex_trylock(&pool.caller)) {
        for (long i = 0; i < count; i++) task(arguments, i);
        return;
    }
    pool.task = task;
    pool.arguments = arguments;
    pool.count = count;
    atomic_store(&pool.next, 0);
    atomic_fetch_add(&pool.job, 1);
    atomic_fetch_or(&pool.gate, OPEN);
    if (atomic_load(&pool.sleepers)) {
        pthread_mutex_lock(&pool.lock);
        pthread_cond_broadcast(&pool.wake);
        pthread_mutex_unlock(&pool.lock);
    }
    take_tasks();
    atomic_fetch_and(&pool.gate, ~OPEN);
    for (int i = 0; atomic_load(&pool.gate); i++) {
        if (i < SPINS) _mm_pause();
        else sched_yield();
    }
    pthread_mutex_unlock(&pool.caller);
}

int dl_threads(void) { return pool.workers + 1; }
