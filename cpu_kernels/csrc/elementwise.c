#include "tier.h"

#include "elementwise.h"
#include "vectors.h"

#define BLOCK 4096 /* numbers of a thread's share are a multiple of this */

void TIERED(add)(const void *record, const struct team *team)
{
    const struct add_record *a = record;
    int64_t i = share(a->size, BLOCK, team->thread, team->size);
    int64_t end = share(a->size, BLOCK, team->thread + 1, team->size);
    for (; i + LANES <= end; i += LANES)
        store(a->y + i, add(load(a->x + i), load(a->other + i)));
    for (; i < end; i++)
        a->y[i] = a->x[i] + a->other[i];
}

void TIERED(scale)(const void *record, const struct team *team)
{
    const struct scale_record *a = record;
    const float factor = (float)a->factor;
    int64_t i = share(a->size, BLOCK, team->thread, team->size);
    int64_t end = share(a->size, BLOCK, team->thread + 1, team->size);
    for (; i + LANES <= end; i += LANES)
        store(a->y + i, multiply(load(a->x + i), all(factor)));
    for (; i < end; i++)
        a->y[i] = a->x[i] * factor;
}

#include "tier_end.h"
