/* Sums and products of whole tensors. */
#ifndef ELEMENTWISE_H
#define ELEMENTWISE_H

#include "kernel.h"

/* y = x + other; y may be x. float32 [size] */
#define ADD_FIELDS(FIELD) FIELD(const float *, x) FIELD(const float *, other) FIELD(float *, y) FIELD(int64_t, size)
RECORD(add, ADD_FIELDS)

/* y = x * factor. float32 [size] */
#define SCALE_FIELDS(FIELD) FIELD(const float *, x) FIELD(float *, y) FIELD(int64_t, size) FIELD(double, factor)
RECORD(scale, SCALE_FIELDS)

#endif
