#include "tier.h"

#include "activations.h"
#include "gate.h"

#define BLOCK 512 /* numbers of a row that one thread computes, a multiple of LANES */

INLINE floats gated(floats gate, floats up, int by_gelu)
{
    return multiply(by_gelu ? gelu(gate) : silu(gate), up);
}

INLINE void gate_numbers(const float *gate, const float *up, float *y, int64_t count, int by_gelu)
{
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES)
        store(y + i, gated(load(gate + i), load(up + i), by_gelu));
    if (i < count) {
        const floats last_gate = load_some(gate + i, count - i, 0.0f), last_up = load_some(up + i, count - i, 0.0f);
        store_some(y + i, gated(last_gate, last_up, by_gelu), count - i);
    }
}

void TIERED(gate)(const void *record, const struct team *team)
{
    const struct gate_record *a = record;
    const int64_t blocks = (a->dim + BLOCK - 1) / BLOCK;
    const int64_t end = share(a->rows * blocks, 1, team->thread + 1, team->size);
    for (int64_t number = share(a->rows * blocks, 1, team->thread, team->size); number < end; number++) {
        const int64_t row = number / blocks, first = number % blocks * BLOCK;
        const int64_t count = a->dim - first < BLOCK ? a->dim - first : BLOCK;
        const float *gate = a->gate + row * a->gate_stride + first, *up = a->up + row * a->up_stride + first;
        if (a->by_gelu)
            gate_numbers(gate, up, a->y + row * a->dim + first, count, 1);
        else
            gate_numbers(gate, up, a->y + row * a->dim + first, count, 0);
    }
}

#include "tier_end.h"
