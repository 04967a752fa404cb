/* Rotary position embedding (Su et al. 2021). */
#ifndef ROTARY_H
#define ROTARY_H

#include "kernel.h"

/* x * cos + rotate_half(x) * sin of queries and keys: float32 [rows, heads, 2 * half], strides in numbers; q_out and k_out
 * contiguous, cos and sin [rows, 2 * half] contiguous. Rounded as the operations apart. */
#define ROTARY_FIELDS(FIELD) \
    FIELD(const float *, q) FIELD(const float *, k) FIELD(float *, q_out) FIELD(float *, k_out) \
    FIELD(const float *, cos) FIELD(const float *, sin) FIELD(int64_t, rows) FIELD(int64_t, half) \
    FIELD(int64_t, q_heads) FIELD(int64_t, q_head_stride) FIELD(int64_t, q_row_stride) \
    FIELD(int64_t, k_heads) FIELD(int64_t, k_head_stride) FIELD(int64_t, k_row_stride)
RECORD(rotary, ROTARY_FIELDS)

#endif
