/* What sampling needs of a softmax: weights, and their sums by block. */
#ifndef SOFTMAX_H
#define SOFTMAX_H

#include "kernel.h"

#define SOFTMAX_BLOCK 256 /* logits of a block; the last one of a row may be shorter */

/* The weights exp((logit - largest) * factor) of logits [rows, width], row_stride numbers from row to row: of num_rows of
 * the rows, numbered by rows, or the first ones where it is NULL; of each num_blocks blocks, from first_blocks [num_rows]
 * on, or the first ones where that is NULL. largest and factors are [rows]. A weight that is not greater than its floor
 * [num_rows] counts as 0.
 *
 * Where it is not NULL, sums [num_rows, num_blocks] receives the sum of each block, weights [num_rows, num_blocks,
 * SOFTMAX_BLOCK] its weights, zeros behind the end of a row, and new_maxima [num_rows, num_blocks] its largest weight.
 * maxima, if not NULL, are those of all blocks of all rows, blocks_of_row from row to row: a block that has no weight
 * above the floor is skipped. Sums are the same to the bit for any rows beside a row. */
#define SOFTMAX_BLOCKS_FIELDS(FIELD) \
    FIELD(const float *, logits) FIELD(int64_t, row_stride) FIELD(int64_t, width) \
    FIELD(const int64_t *, rows) FIELD(int64_t, num_rows) FIELD(const int64_t *, first_blocks) FIELD(int64_t, num_blocks) \
    FIELD(const float *, largest) FIELD(const float *, factors) FIELD(const float *, floors) \
    FIELD(const float *, maxima) FIELD(int64_t, blocks_of_row) \
    FIELD(double *, sums) FIELD(float *, new_maxima) FIELD(float *, weights)
RECORD(softmax_blocks, SOFTMAX_BLOCKS_FIELDS)

#endif
