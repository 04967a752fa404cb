/* Products of small float32 matrices; include tier.h first. Each number is a sum in the order of the depth, whatever
 * the matrices' sizes, with each product and sum rounded once where the tier has FMA. */
#ifndef FLOAT_PRODUCT_H
#define FLOAT_PRODUCT_H

#include "vectors.h"

#if WIDTH == 16
#define TILE_ROWS 6
#elif WIDTH == 8 || defined(__aarch64__)
#define TILE_ROWS 6
#else
#define TILE_ROWS 2
#endif
#define TILE_SUMS (WIDTH == 16 ? 24 : TILE_ROWS) /* vectors of sums that registers hold */
#define MOST_VECTORS 4

/* c += a b: a [rows, depth], b [depth, vectors * LANES], c [rows, vectors * LANES] with these strides. */
INLINE void multiply_tile(
    const int rows, const int vectors, const float *a, int64_t a_stride, const float *b, int64_t b_stride, float *c,
    int64_t c_stride, int64_t depth)
{
    floats sums[TILE_ROWS][MOST_VECTORS];
    _Pragma("GCC unroll 6") for (int row = 0; row < rows; row++)
        _Pragma("GCC unroll 4") for (int v = 0; v < vectors; v++) sums[row][v] = load(c + row * c_stride + LANES * v);
    for (int64_t k = 0; k < depth; k++) {
        floats numbers[MOST_VECTORS];
        _Pragma("GCC unroll 4") for (int v = 0; v < vectors; v++) numbers[v] = load(b + k * b_stride + LANES * v);
        _Pragma("GCC unroll 6") for (int row = 0; row < rows; row++) {
            const floats factor = all(a[row * a_stride + k]);
            _Pragma("GCC unroll 4") for (int v = 0; v < vectors; v++)
                sums[row][v] = multiply_add(factor, numbers[v], sums[row][v]);
        }
    }
    _Pragma("GCC unroll 6") for (int row = 0; row < rows; row++)
        _Pragma("GCC unroll 4") for (int v = 0; v < vectors; v++) store(c + row * c_stride + LANES * v, sums[row][v]);
}

#define DEFINE_ROWS(rows) \
    static void multiply_##rows##_rows( \
        const float *a, int64_t a_stride, const float *b, int64_t b_stride, int64_t vectors, float *c, \
        int64_t c_stride, int64_t depth) \
    { \
        enum { MOST = TILE_SUMS / rows < MOST_VECTORS ? TILE_SUMS / rows : MOST_VECTORS }; \
        int64_t v = 0; \
        for (; v + MOST <= vectors; v += MOST) \
            multiply_tile(rows, MOST, a, a_stride, b + LANES * v, b_stride, c + LANES * v, c_stride, depth); \
        for (; v < vectors; v++) \
            multiply_tile(rows, 1, a, a_stride, b + LANES * v, b_stride, c + LANES * v, c_stride, depth); \
    }
DEFINE_ROWS(1)
DEFINE_ROWS(2)
#if TILE_ROWS == 6
DEFINE_ROWS(3)
DEFINE_ROWS(4)
DEFINE_ROWS(5)
DEFINE_ROWS(6)
#endif
#undef DEFINE_ROWS

typedef void multiply_code(
    const float *, int64_t, const float *, int64_t, int64_t vectors, float *, int64_t, int64_t depth);
static multiply_code *const multiply_codes[] = {
    multiply_1_rows, multiply_2_rows,
#if TILE_ROWS == 6
    multiply_3_rows, multiply_4_rows, multiply_5_rows, multiply_6_rows,
#endif
};

/* c += a b, of any number of rows, in tiles of nearly equal numbers of them. */
static inline void multiply_matrices(
    int64_t rows, const float *a, int64_t a_stride, const float *b, int64_t b_stride, int64_t vectors, float *c,
    int64_t c_stride, int64_t depth)
{
    for (int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS; tiles; tiles--) {
        const int64_t count = rows / tiles;
        multiply_codes[count - 1](a, a_stride, b, b_stride, vectors, c, c_stride, depth);
        rows -= count;
        a += count * a_stride;
        c += count * c_stride;
    }
}

#endif
