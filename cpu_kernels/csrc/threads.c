#include "threads.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>

#define EXPORTED __attribute__((visibility("default")))
#define MAX_THREADS 256
#define STACK_BYTES (1 << 21) /* macOS would give a quarter of this */
#define SPINS 2000            /* looks at a number before a thread sleeps: about 50 us */
#define LINE 64               /* bytes of a cache line */

static void wait_for_openmp(void *launch)
{
    ((const struct launch *)launch)->wait();
}

EXPORTED void quickchange_run_in_team(void *data)
{
    struct launch *launch = data;
    const struct team team = {
        launch->thread_number(), launch->num_threads(), wait_for_openmp, launch, &launch->tickets};
    launch->code(launch->record, &team);
}

EXPORTED void quickchange_run_alone(kernel_code *code, const void *record)
{
    _Atomic int64_t tickets = 0;
    const struct team team = {0, 1, NULL, NULL, &tickets};
    code(record, &team);
}

/* Own threads. The caller is thread 0 of each team. Every other thread waits until its own number of calls grows, then
 * runs the call of the pool, whose end is a barrier of its team. Between two calls no thread reads the call. */

struct worker {
    _Alignas(LINE) _Atomic uint64_t num_calls;
};

static struct {
    pthread_mutex_t calls; /* held by the caller of a call */
    pthread_mutex_t lock;  /* of the condition */
    pthread_cond_t changed;
    int64_t num_workers;
    struct worker workers[MAX_THREADS]; /* from 1 */
    kernel_code *code;                  /* this call */
    const void *record;
    int64_t size;
    _Alignas(LINE) _Atomic int64_t num_arrived; /* at the barrier */
    _Alignas(LINE) _Atomic uint64_t num_barriers;
    _Alignas(LINE) _Atomic int64_t tickets;
} pool = {
    .calls = PTHREAD_MUTEX_INITIALIZER, .lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER};

static inline void pause_briefly(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb"); /* yield does nothing on most */
#endif
}

/* Until *number differs from seen: look at it for a while, then sleep. */
static void wait_for_change(_Atomic uint64_t *number, uint64_t seen)
{
    for (int i = 0; i < SPINS; i++) {
        if (atomic_load_explicit(number, memory_order_acquire) != seen)
            return;
        pause_briefly();
    }
    pthread_mutex_lock(&pool.lock);
    while (atomic_load_explicit(number, memory_order_acquire) == seen)
        pthread_cond_wait(&pool.changed, &pool.lock);
    pthread_mutex_unlock(&pool.lock);
}

/* Add one to each of these numbers, and wake the threads that sleep. */
static void advance(_Atomic uint64_t *const numbers[], int64_t count)
{
    pthread_mutex_lock(&pool.lock);
    for (int64_t i = 0; i < count; i++)
        atomic_fetch_add_explicit(numbers[i], 1, memory_order_release);
    pthread_cond_broadcast(&pool.changed);
    pthread_mutex_unlock(&pool.lock);
}

/* The last of the team to arrive begins the next barrier and lets the others go. */
static void wait_for_team(void *size)
{
    const int64_t others = *(const int64_t *)size - 1;
    const uint64_t barrier = atomic_load_explicit(&pool.num_barriers, memory_order_acquire);
    if (atomic_fetch_add_explicit(&pool.num_arrived, 1, memory_order_acq_rel) == others) {
        atomic_store_explicit(&pool.num_arrived, 0, memory_order_relaxed);
        advance((_Atomic uint64_t *const[]){&pool.num_barriers}, 1);
    } else {
        wait_for_change(&pool.num_barriers, barrier);
    }
}

static void run_as(int64_t thread)
{
    int64_t size = pool.size;
    const struct team team = {thread, size, wait_for_team, &size, &pool.tickets};
    pool.code(pool.record, &team);
    barrier(&team);
}

static void *serve(void *worker)
{
    _Atomic uint64_t *num_calls = &((struct worker *)worker)->num_calls;
    const int64_t thread = (struct worker *)worker - pool.workers;
    for (uint64_t seen = 0;; seen++) {
        wait_for_change(num_calls, seen);
        run_as(thread);
    }
    return NULL;
}

/* Start threads until there are num_workers beside the caller's, or the system has no more. */
static void start_workers(int64_t num_workers)
{
    pthread_attr_t attributes;
    sigset_t all, before;
    if (pool.num_workers >= num_workers || pthread_attr_init(&attributes))
        return;
    pthread_attr_setstacksize(&attributes, STACK_BYTES);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are for the process's own threads */
    while (pool.num_workers < num_workers) {
        struct worker *worker = &pool.workers[pool.num_workers + 1];
        pthread_t thread;
        atomic_store(&worker->num_calls, 0);
        if (pthread_create(&thread, &attributes, serve, worker))
            break;
        pool.num_workers++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
}

/* In a process that was just forked, and has none of the threads. */
static void forget_threads(void)
{
    pool.calls = pool.lock = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
    pool.changed = (pthread_cond_t)PTHREAD_COND_INITIALIZER;
    pool.num_workers = 0;
    pool.num_arrived = pool.tickets = 0;
}

static void handle_forks(void)
{
    pthread_atfork(NULL, NULL, forget_threads);
}

EXPORTED void quickchange_run_on_own_threads(kernel_code *code, const void *record, int64_t threads)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, handle_forks);
    threads = threads < MAX_THREADS ? threads : MAX_THREADS;
    pthread_mutex_lock(&pool.calls);
    start_workers(threads - 1);
    pool.code = code;
    pool.record = record;
    pool.size = threads <= pool.num_workers ? threads : pool.num_workers + 1;
    _Atomic uint64_t *numbers[MAX_THREADS];
    for (int64_t thread = 1; thread < pool.size; thread++)
        numbers[thread - 1] = &pool.workers[thread].num_calls;
    if (pool.size > 1)
        advance(numbers, pool.size - 1);
    run_as(0);
    pthread_mutex_unlock(&pool.calls);
}
