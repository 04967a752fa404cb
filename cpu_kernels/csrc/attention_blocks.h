/* Keys and values on their way into a cache, float32 or bfloat16, and in blocks out of it; include tier.h first. */
#ifndef ATTENTION_BLOCKS_H
#define ATTENTION_BLOCKS_H

#include "transpose.h"
#include "vectors.h"

#define KEYS 64 /* of a block */

static inline int64_t whole_vectors(int64_t count) { return (count + LANES - 1) / LANES * LANES; }
static inline int64_t least(int64_t x, int64_t y) { return x < y ? x : y; }
static inline int64_t most(int64_t x, int64_t y) { return x > y ? x : y; }

static void write_numbers(const float *x, char *y, int64_t size, int is_bfloat16)
{
    if (!is_bfloat16) {
        __builtin_memcpy(y, x, size * sizeof(float));
        return;
    }
    uint16_t *halves = (uint16_t *)y;
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES)
        store_bfloat16(halves + i, load(x + i));
    if (i < size) {
        uint16_t rest[LANES];
        store_bfloat16(rest, load_some(x + i, size - i, 0.0f));
        __builtin_memcpy(halves + i, rest, (size - i) * sizeof *rest);
    }
}

static inline float number_at(const char *x, int64_t i, int is_bfloat16)
{
    if (!is_bfloat16)
        return ((const float *)x)[i];
    const uint32_t bits = (uint32_t)((const uint16_t *)x)[i] << 16;
    float number;
    __builtin_memcpy(&number, &bits, sizeof number);
    return number;
}

/* WIDTH keys, some dimensions of them -> packed. Behind the last key it stands in for those that are missing, which no
 * row sees. */
#define EACH_KEY(rows, expression) \
    integer_part rows[WIDTH]; \
    _Pragma("GCC unroll 16") for (int i = 0; i < WIDTH; i++) { \
        const int64_t at = least(key + i, num - 1) * dim + d; \
        rows[i] = (expression); \
    } \
    transpose(rows)
#define PACK(rows, expression) \
    _Pragma("GCC unroll 16") for (int i = 0; i < WIDTH; i++) \
        *(loose_integers *)(packed + (d + i) * KEYS + key) = (expression)

static inline int64_t pack_floats(const float *keys, int64_t key, int64_t num, int64_t dim, float *packed)
{
    int64_t d = 0;
    for (; d + WIDTH <= dim; d += WIDTH) {
        EACH_KEY(rows, *(const loose_integers *)(keys + at));
        PACK(rows, rows[i]);
    }
    return d;
}

static inline int64_t pack_bfloat16(const uint16_t *keys, int64_t key, int64_t num, int64_t dim, float *packed)
{
    int64_t d = 0;
    for (; d + 2 * WIDTH <= dim; d += 2 * WIDTH) {
        EACH_KEY(pairs, *(const loose_integers *)(keys + at));
        _Pragma("GCC unroll 16") for (int i = 0; i < WIDTH; i++) {
            float *pair = packed + (d + 2 * i) * KEYS + key;
            *(loose_integers *)pair = pairs[i] << 16;
            *(loose_integers *)(pair + KEYS) = pairs[i] & (int32_t)0xFFFF0000;
        }
    }
    for (; d + WIDTH <= dim; d += WIDTH) {
        EACH_KEY(rows, __builtin_convertvector((half_part)*(const loose_halves *)(keys + at), integer_part) << 16);
        PACK(rows, rows[i]);
    }
    return d;
}

/* [num, dim] -> float32 [dim, KEYS], whole vectors of keys */
static void pack_keys(const char *keys, int64_t num, int64_t dim, int is_bfloat16, float *packed)
{
    for (int64_t key = 0; key < whole_vectors(num); key += WIDTH) {
        int64_t d = is_bfloat16 ? pack_bfloat16((const uint16_t *)keys, key, num, dim, packed)
                                : pack_floats((const float *)keys, key, num, dim, packed);
        for (; d < dim; d++)
            for (int i = 0; i < WIDTH; i++)
                packed[d * KEYS + key + i] = number_at(keys, least(key + i, num - 1) * dim + d, is_bfloat16);
    }
}

/* [num, dim] -> float32 [num, width], padded with zeros */
static void pack_values(const char *values, int64_t num, int64_t dim, int64_t width, int is_bfloat16, float *packed)
{
    for (int64_t key = 0; key < num; key++) {
        int64_t d = 0;
        if (is_bfloat16)
            for (; d + LANES <= dim; d += LANES)
                store(packed + key * width + d, load_bfloat16((const uint16_t *)values + key * dim + d));
        for (; d < width; d++)
            packed[key * width + d] = d < dim ? number_at(values, key * dim + d, is_bfloat16) : 0.0f;
    }
}

#undef EACH_KEY
#undef PACK

#endif
