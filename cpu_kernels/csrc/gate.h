/* Gated units of an MLP (Shazeer 2020). */
#ifndef GATE_H
#define GATE_H

#include "kernel.h"

/* y = silu(gate) * up, or gelu(gate) * up: float32 [rows, dim], y contiguous, the others with strides in numbers; y may
 * be one of them. */
#define GATE_FIELDS(FIELD) \
    FIELD(const float *, gate) FIELD(const float *, up) FIELD(float *, y) FIELD(int64_t, rows) FIELD(int64_t, dim) \
    FIELD(int64_t, gate_stride) FIELD(int64_t, up_stride) FIELD(int64_t, by_gelu)
RECORD(gate, GATE_FIELDS)

#endif
