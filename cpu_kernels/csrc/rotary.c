#include "tier.h"

#include "rotary.h"
#include "vectors.h"

static void rotate_head(const float *x, float *y, const float *cos, const float *sin, int64_t half)
{
    int64_t i = 0;
    for (; i + LANES <= half; i += LANES) {
        const floats first = load(x + i), second = load(x + half + i);
        store(y + i, subtract(multiply(first, load(cos + i)), multiply(second, load(sin + i))));
        store(y + half + i, add(multiply(second, load(cos + half + i)), multiply(first, load(sin + half + i))));
    }
    for (; i < half; i++) {
        const float first = x[i], second = x[half + i];
        y[i] = first * cos[i] - second * sin[i];
        y[half + i] = second * cos[half + i] + first * sin[half + i];
    }
}

void TIERED(rotary)(const void *record, const struct team *team)
{
    const struct rotary_record *a = record;
    const int64_t heads = a->q_heads + a->k_heads, dim = 2 * a->half;
    const int64_t end = share(a->rows * heads, 1, team->thread + 1, team->size);
    for (int64_t number = share(a->rows * heads, 1, team->thread, team->size); number < end; number++) {
        const int64_t row = number / heads, head = number % heads, key = head - a->q_heads;
        const float *x = key < 0 ? a->q + head * a->q_head_stride + row * a->q_row_stride
                                 : a->k + key * a->k_head_stride + row * a->k_row_stride;
        float *y = key < 0 ? a->q_out + (row * a->q_heads + head) * dim : a->k_out + (row * a->k_heads + key) * dim;
        rotate_head(x, y, a->cos + row * dim, a->sin + row * dim, a->half);
    }
}

#include "tier_end.h"
