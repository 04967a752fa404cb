/* Layer graphs: a layer's calls of kernels in one launch. */
#ifndef REPLAY_H
#define REPLAY_H

#include "kernel.h"

/* One call. A kernel compiled by Numba takes its record alone and asks OpenMP for its team. */
struct recorded_call {
    union {
        kernel_code *code;
        void (*code_by_numba)(const void *record);
    };
    const void *record;
    int64_t takes_team; /* 0: by Numba */
};

/* A field of a record that points into an input. */
struct input_field {
    int64_t *field;
    int64_t input, offset; /* number of the input, bytes from its address */
};

/* Write the addresses of the inputs into the records, then make the calls one after another. */
#define REPLAY_FIELDS(FIELD) \
    FIELD(const struct recorded_call *, calls) FIELD(int64_t, num_calls) \
    FIELD(const struct input_field *, fields) FIELD(int64_t, num_fields) FIELD(const int64_t *, inputs)
RECORD(replay, REPLAY_FIELDS)

#endif
