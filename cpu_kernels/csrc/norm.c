#include "tier.h"

#include "norm.h"
#include "vectors.h"

static void norm_row(float *x, const float *other, float *y, const float *gain, int64_t dim, float eps)
{
    const int64_t whole = dim / LANES * LANES, rest = dim - whole;
    floats squares = all(0.0f);
    for (int64_t i = 0; i < whole; i += LANES) {
        floats values = load(x + i);
        if (other) {
            values = add(values, load(other + i));
            store(x + i, values);
        }
        squares = multiply_add(values, values, squares);
    }
    if (rest) {
        floats values = load_some(x + whole, rest, 0.0f);
        if (other) {
            values = add(values, load_some(other + whole, rest, 0.0f));
            store_some(x + whole, values, rest);
        }
        squares = multiply_add(values, values, squares);
    }
    const float factor = 1.0f / __builtin_sqrtf(sum_of(squares) / (float)dim + eps);
    for (int64_t i = 0; i < whole; i += LANES)
        store(y + i, multiply(multiply(load(x + i), all(factor)), load(gain + i)));
    for (int64_t i = whole; i < dim; i++)
        y[i] = x[i] * factor * gain[i];
}

void TIERED(rms_norm)(const void *record, const struct team *team)
{
    const struct rms_norm_record *a = record;
    const int64_t count = a->rows * a->heads, end = share(count, 1, team->thread + 1, team->size);
    for (int64_t number = share(count, 1, team->thread, team->size); number < end; number++) {
        const int64_t row = number / a->heads, head = number % a->heads, place = number * a->dim;
        norm_row(
            a->x + row * a->row_stride + head * a->head_stride, a->other ? a->other + place : NULL, a->y + place,
            a->gain, a->dim, (float)a->eps);
    }
}

#include "tier_end.h"
