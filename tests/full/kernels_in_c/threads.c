/* The library's own threads under ThreadSanitizer: teams of all sizes, barriers, callers side by side, a forked process. */
#include "threads.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#define MOST 6
#define ROUNDS 5

struct sums {
    int64_t of_thread[MOST]; /* plain memory: what a barrier orders is no race */
    int64_t total, size;
};

/* Each thread writes, and after a barrier thread 0 adds up what all wrote. */
static void add_up(const void *record, const struct team *team)
{
    struct sums *sums = *(struct sums *const *)record;
    for (int round = 0; round < ROUNDS; round++) {
        sums->of_thread[team->thread] = team->thread + round;
        barrier(team);
        if (team->thread == 0) {
            sums->size = team->size;
            for (int64_t thread = 0; thread < team->size; thread++)
                sums->total += sums->of_thread[thread];
        }
        barrier(team);
    }
}

static int64_t expected(int64_t size)
{
    return ROUNDS * size * (size - 1) / 2 + size * ROUNDS * (ROUNDS - 1) / 2;
}

static void *call_often(void *unused)
{
    (void)unused;
    for (int i = 0; i < 400; i++) {
        struct sums sums = {0}, *record = &sums;
        const int64_t threads = 1 + i % MOST;
        quickchange_run_on_own_threads(add_up, &record, threads);
        if (sums.size != threads || sums.total != expected(threads)) {
            fprintf(stderr, "%lld threads: a team of %lld, sum %lld\n", (long long)threads, (long long)sums.size,
                    (long long)sums.total);
            exit(1);
        }
        if (i % 100 == 99)
            usleep(2000); /* the threads fall asleep */
    }
    return NULL;
}

int main(int count, char **words)
{
    (void)words;
    pthread_t other;
    pthread_create(&other, NULL, call_often, NULL);
    call_often(NULL);
    pthread_join(other, NULL);
    if (count > 1) { /* ThreadSanitizer allows no threads in a process that was forked beside threads */
        const pid_t child = fork();
        if (!child) {
            call_often(NULL);
            _exit(0);
        }
        int status;
        waitpid(child, &status, 0);
        if (status)
            return 2;
        call_often(NULL);
    }
    puts("right");
    return 0;
}
