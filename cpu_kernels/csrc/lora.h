/* Low-rank deltas of many adapters on the rows of one linear (Hu et al. 2021): y += factor * x @ A @ B. */
#ifndef LORA_H
#define LORA_H

#include "kernel.h"

/* Rows that use one adapter. */
struct lora_task {
    int64_t first, end; /* rows of x and y */
    int64_t adapter;    /* its place in a linear's table */
    float factor;
    int32_t unused;
    int64_t rows_before, tiles_before; /* rows and tiles of the tasks before: where its part of low begins */
};

/* All tasks of a step. tiles, tile_bytes and lists are for kernels with tiles. */
struct lora_tasks {
    int64_t count;
    float *low; /* scratch memory for x @ A of all tasks' rows, row by row */
    int64_t low_stride;
    void *tiles;
    int64_t tile_bytes;
    void *lists;
    struct lora_task tasks[];
};

/* What one adapter changes of a linear; rank 0: nothing. */
struct lora_factors {
    const float *a; /* [rank, inputs], a_stride numbers from row to row */
    int64_t a_stride;
    const float *b; /* [rank, outputs] */
    int64_t rank;
};

/* x [rows, inputs] contiguous; y_stride numbers from row to row of y [rows, outputs]. *factors is the linear's table, by
 * adapter. A row's delta is the same to the bit in any batch, and whether its neighbours are of the same adapter or not. */
#define ADD_DELTAS_FIELDS(FIELD) \
    FIELD(const float *, x) FIELD(float *, y) FIELD(int64_t, y_stride) FIELD(int64_t, inputs) FIELD(int64_t, outputs) \
    FIELD(const struct lora_tasks *, tasks) FIELD(const struct lora_factors *const *, factors)
RECORD(add_deltas, ADD_DELTAS_FIELDS)

#endif
