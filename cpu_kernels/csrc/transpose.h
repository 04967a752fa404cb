/* The transpose of WIDTH x WIDTH numbers of 32 bits; include tier.h first. */
#ifndef TRANSPOSE_H
#define TRANSPOSE_H

#include "vectors.h"

/* Each round swaps halves of pairs of rows: numbers, then pairs of them, then registers' quarters. */
INLINE void transpose(integer_part rows[WIDTH])
{
#if defined(__aarch64__)
    const float64x2_t even = (float64x2_t)vtrn1q_s32((int32x4_t)rows[0], (int32x4_t)rows[1]);
    const float64x2_t odd = (float64x2_t)vtrn2q_s32((int32x4_t)rows[0], (int32x4_t)rows[1]);
    const float64x2_t even_below = (float64x2_t)vtrn1q_s32((int32x4_t)rows[2], (int32x4_t)rows[3]);
    const float64x2_t odd_below = (float64x2_t)vtrn2q_s32((int32x4_t)rows[2], (int32x4_t)rows[3]);
    rows[0] = (integer_part)vtrn1q_f64(even, even_below);
    rows[1] = (integer_part)vtrn1q_f64(odd, odd_below);
    rows[2] = (integer_part)vtrn2q_f64(even, even_below);
    rows[3] = (integer_part)vtrn2q_f64(odd, odd_below);
#else
    integer_part pairs[WIDTH];
    _Pragma("GCC unroll 16") for (int i = 0; i < WIDTH; i += 2) {
        pairs[i] = (integer_part)OF_REGISTER(unpacklo_ps)((float_part)rows[i], (float_part)rows[i + 1]);
        pairs[i + 1] = (integer_part)OF_REGISTER(unpackhi_ps)((float_part)rows[i], (float_part)rows[i + 1]);
    }
#define LOWER_PAIRS(x, y) OF_REGISTER(shuffle_ps)((float_part)(x), (float_part)(y), 0x44)
#define UPPER_PAIRS(x, y) OF_REGISTER(shuffle_ps)((float_part)(x), (float_part)(y), 0xEE)
    /* now row 4 n + i has in its quarter k the numbers 4 k + i of the rows 4 n to 4 n + 3 */
    _Pragma("GCC unroll 16") for (int i = 0; i < WIDTH; i += 4)
        _Pragma("GCC unroll 2") for (int upper = 0; upper < 2; upper++) {
            rows[i + 2 * upper] = (integer_part)LOWER_PAIRS(pairs[i + upper], pairs[i + upper + 2]);
            rows[i + 2 * upper + 1] = (integer_part)UPPER_PAIRS(pairs[i + upper], pairs[i + upper + 2]);
        }
#undef LOWER_PAIRS
#undef UPPER_PAIRS
#if WIDTH == 8
    _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++) {
        const __m256i x = (__m256i)rows[i], y = (__m256i)rows[i + 4];
        rows[i] = (integer_part)_mm256_permute2x128_si256(x, y, 0x20);
        rows[i + 4] = (integer_part)_mm256_permute2x128_si256(x, y, 0x31);
    }
#elif WIDTH == 16
    _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++) {
        __m512i x[4], even[2], odd[2];
        _Pragma("GCC unroll 4") for (int n = 0; n < 4; n++) x[n] = (__m512i)rows[4 * n + i];
        _Pragma("GCC unroll 2") for (int n = 0; n < 2; n++) {
            even[n] = _mm512_shuffle_i32x4(x[2 * n], x[2 * n + 1], 0x88);
            odd[n] = _mm512_shuffle_i32x4(x[2 * n], x[2 * n + 1], 0xDD);
        }
        rows[i] = (integer_part)_mm512_shuffle_i32x4(even[0], even[1], 0x88);
        rows[i + 4] = (integer_part)_mm512_shuffle_i32x4(odd[0], odd[1], 0x88);
        rows[i + 8] = (integer_part)_mm512_shuffle_i32x4(even[0], even[1], 0xDD);
        rows[i + 12] = (integer_part)_mm512_shuffle_i32x4(odd[0], odd[1], 0xDD);
    }
#endif
#endif
}

#endif
