/* Blocks of work that the threads of a team draw one after the other, so that none waits long for a slow one.
 *
 * Equal shares (share() in kernel.h) make a call as slow as its slowest thread: one on an efficiency core, or one whose
 * core another process uses. Here a thread that is ready draws the next blocks:
 *
 *     struct blocks drawn = blocks_of(team, count);
 *     while (draw(&drawn))
 *         for (int64_t block = drawn.first; block < drawn.end; block++)
 *             ...
 *
 * All threads must draw until there are no more. Between two such loops of a team there must be a barrier.
 *
 * In each round as many runs of blocks are drawn as there are threads; together they are half of what is left (factoring:
 * Hummel, Schonberg and Flynn 1992). Runs are long at first, since memory is read fastest in long runs, and short at
 * the end, where all threads finish within the time of a block or so. A ticket is the number of a drawing, and its blocks
 * depend on the ticket alone; which thread draws it changes from call to call. So a result must depend on its block, and
 * never on the run or the thread.
 *
 * The counter of tickets is 0 between two loops: the thread that draws the last ticket resets it. Each thread stops at its
 * first ticket without blocks, so nobody draws after the last, and the barrier comes before the next loop.
 */
#ifndef BLOCKS_H
#define BLOCKS_H

#include <stdatomic.h>

#include "kernel.h"

struct blocks {
    int64_t first, end; /* the run that was drawn last */
    int64_t left;       /* not in rounds before the current one */
    int64_t passed;     /* tickets of those rounds */
    int64_t count;
    const struct team *team;
};

static inline struct blocks blocks_of(const struct team *team, int64_t count)
{
    return (struct blocks){.left = count, .count = count, .team = team};
}

/* The next run of blocks as first and end; 0 where there are no more. */
static inline int draw(struct blocks *drawn)
{
    const int64_t size = drawn->team->size;
    if (size == 1) { /* one run with everything */
        drawn->first = drawn->end;
        drawn->end = drawn->count;
        return drawn->first < drawn->end;
    }
    const int64_t ticket = atomic_fetch_add_explicit(drawn->team->tickets, 1, memory_order_relaxed);
    int64_t length;
    for (;;) {
        length = drawn->left / (2 * size);
        length = length ? length : 1;
        if (drawn->left <= 0 || ticket - drawn->passed < size)
            break;
        drawn->left -= length * size;
        drawn->passed += size;
    }
    const int64_t number = ticket - drawn->passed; /* within its round */
    if (number * length < drawn->left) {
        drawn->first = drawn->count - drawn->left + number * length;
        drawn->end = drawn->first + length;
        return 1;
    }
    /* Every ticket has blocks up to number passed + left (its length is 1 there), and each thread draws one without. */
    if (number - drawn->left == size - 1)
        atomic_store_explicit(drawn->team->tickets, 0, memory_order_relaxed);
    return 0;
}

#endif
