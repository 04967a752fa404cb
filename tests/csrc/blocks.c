/* Draws blocks with a team of threads in many loops, and counts how often each block was drawn.
 *
 * blocks THREADS LOOPS COUNT... prints a line for each COUNT: it, the fewest and the most times that one of so many blocks
 * was drawn in all loops, the counter of tickets afterwards, and the number of runs of the last loop. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

#include "blocks.h"

static pthread_barrier_t everybody;
static _Atomic int64_t tickets;
static _Atomic int64_t num_runs;
static int64_t num_threads, num_loops, num_blocks;
static int32_t *times; /* of each block */

static void wait_for_everybody(void *unused)
{
    (void)unused;
    pthread_barrier_wait(&everybody);
}

static void *work(void *number)
{
    const struct team team = {(int64_t)(intptr_t)number, num_threads, wait_for_everybody, NULL, &tickets};
    for (int64_t loop = 0; loop < num_loops; loop++) {
        struct blocks drawn = blocks_of(&team, num_blocks);
        if (team.thread == 0)
            num_runs = 0;
        barrier(&team);
        while (draw(&drawn)) {
            num_runs++;
            for (int64_t block = drawn.first; block < drawn.end; block++)
                times[block]++; /* not atomic: a block that two threads drew is a data race */
        }
        barrier(&team);
    }
    return NULL;
}

static void run(int64_t count)
{
    pthread_t threads[64];
    num_blocks = count;
    times = calloc(count + 1, sizeof *times);
    for (int64_t thread = 0; thread < num_threads; thread++)
        pthread_create(&threads[thread], NULL, work, (void *)(intptr_t)thread);
    for (int64_t thread = 0; thread < num_threads; thread++)
        pthread_join(threads[thread], NULL);
    int64_t fewest = num_loops, most = num_loops;
    for (int64_t block = 0; block < count; block++) {
        fewest = times[block] < fewest ? times[block] : fewest;
        most = times[block] > most ? times[block] : most;
    }
    printf("%lld %lld %lld %lld %lld\n", (long long)count, (long long)fewest, (long long)most, (long long)tickets,
           (long long)num_runs);
    free(times);
}

int main(int num_arguments, char **arguments)
{
    num_threads = atoll(arguments[1]);
    num_loops = atoll(arguments[2]);
    pthread_barrier_init(&everybody, NULL, (unsigned)num_threads);
    for (int i = 3; i < num_arguments; i++)
        run(atoll(arguments[i]));
    return 0;
}
