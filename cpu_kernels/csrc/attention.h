/* Attention of rows of any number of sequences, whose keys and values are in a cache. */
#ifndef ATTENTION_H
#define ATTENTION_H

#include "kernel.h"

/* First writes the keys and values of all rows into the cache; then rows attend to their sequences.
 *
 * q float32 [rows, heads, dim], k [rows, kv_heads, dim] and v [rows, kv_heads, value_dim], strided by row and head, the
 * numbers of a head contiguous. keys and values: [slots, kv_heads, positions, dim], strided by slot and head, float32,
 * or bfloat16 where is_bfloat16 is 1. out float32 [rows, kv_heads * group, value_dim]. slots and positions int64 [rows];
 * spans int64 [num_spans, 2]: first row, and the one behind the last, of rows that attend.
 *
 * A row sees the keys of its sequence up to its own position; the last window of them where window is not 0. Scores are
 * q k scale; softcap tanh(score / softcap) where softcap is not 0. sinks float32 [kv_heads * group], or NULL: scores of
 * one more key each, whose value is 0.
 *
 * Up to panel rows share the keys that a thread loads. scratch is scratch_size numbers for each thread, behind 16 for
 * the team. partials, or NULL: room for the parts (attention.c) of long sequences, num_parts for each row, whose parts are
 * then computed by several threads; panel is then 1. */
#define ATTENTION_FIELDS(FIELD) \
    FIELD(const float *, q) FIELD(const float *, k) FIELD(const float *, v) FIELD(char *, keys) FIELD(char *, values) \
    FIELD(float *, out) FIELD(const int64_t *, slots) FIELD(const int64_t *, positions) FIELD(const int64_t *, spans) \
    FIELD(int64_t, num_spans) FIELD(const float *, sinks) FIELD(float *, scratch) FIELD(int64_t, scratch_size) \
    FIELD(float *, partials) FIELD(int64_t, num_parts) FIELD(int64_t, panel) FIELD(int64_t, is_bfloat16) \
    FIELD(int64_t, rows) FIELD(int64_t, window) FIELD(int64_t, kv_heads) FIELD(int64_t, group) FIELD(int64_t, dim) \
    FIELD(int64_t, value_dim) FIELD(int64_t, q_row) FIELD(int64_t, q_head) FIELD(int64_t, k_row) \
    FIELD(int64_t, k_head) FIELD(int64_t, v_row) FIELD(int64_t, v_head) FIELD(int64_t, key_slot) \
    FIELD(int64_t, key_head) FIELD(int64_t, value_slot) FIELD(int64_t, value_head) FIELD(double, scale) \
    FIELD(double, softcap)
RECORD(attention, ATTENTION_FIELDS)

#endif
