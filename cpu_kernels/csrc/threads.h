/* How a kernel is run on the threads of a team. */
#ifndef THREADS_H
#define THREADS_H

#include "kernel.h"

/* One call: the code and its record, and what the OpenMP library has for its threads. */
struct launch {
    kernel_code *code;
    const void *record;
    int (*thread_number)(void);
    int (*num_threads)(void);
    void (*wait)(void);
    int64_t unused[8];       /* the counter has a cache line of its own */
    _Atomic int64_t tickets; /* of blocks.h; 0 */
};

/* The function that GOMP_parallel calls in every thread of its team, with a struct launch. */
void quickchange_run_in_team(void *launch);

/* Run a call on the caller's thread alone. */
void quickchange_run_alone(kernel_code *code, const void *record);

/* Run a call on threads of this library's own, where there is no OpenMP library to join: on so many as the system gives,
 * the caller's among them. Returns when all have ended. Calls of several threads wait for each other; a process that was
 * forked starts threads of its own. */
void quickchange_run_on_own_threads(kernel_code *code, const void *record, int64_t threads);

#endif
