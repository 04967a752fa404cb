/* Root mean square norm (Zhang and Sennrich 2019). */
#ifndef NORM_H
#define NORM_H

#include "kernel.h"

/* y = x * gain / sqrt(mean(x**2) + eps) of each row: x strided [rows, heads, dim], strides in numbers; y and other contiguous.
 * Where other is not NULL, x += other first, to the same bits as the two operations apart. */
#define RMS_NORM_FIELDS(FIELD) \
    FIELD(float *, x) FIELD(const float *, other) FIELD(float *, y) FIELD(const float *, gain) \
    FIELD(int64_t, rows) FIELD(int64_t, heads) FIELD(int64_t, dim) \
    FIELD(int64_t, row_stride) FIELD(int64_t, head_stride) FIELD(double, eps)
RECORD(rms_norm, RMS_NORM_FIELDS)

#endif
