/* Vectors of sixteen numbers, in as many registers as the tier needs; include tier.h first.
 *
 * The same sums in the same order on every tier: lane i always adds the numbers i, 16 + i, 32 + i and so on, and sum_of
 * adds the lanes in one order. A product and a sum are rounded once where the tier has FMA (all but the generic one of
 * x86-64), twice elsewhere; nothing else differs between tiers.
 */
#ifndef VECTORS_H
#define VECTORS_H

#include <stdint.h>

#define LANES 16
#if defined(TIER_avx512vnni) || defined(TIER_amx)
#define WIDTH 16 /* lanes of a register */
#define OF_REGISTER(name) _mm512_##name
#elif defined(TIER_avx2) || defined(TIER_avxvnni)
#define WIDTH 8
#define OF_REGISTER(name) _mm256_##name
#else
#define WIDTH 4
#define OF_REGISTER(name) _mm_##name
#endif
#define PARTS (LANES / WIDTH)

#define INLINE static inline __attribute__((always_inline))

typedef float float_part __attribute__((vector_size(4 * WIDTH)));
typedef int32_t integer_part __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t half_part __attribute__((vector_size(2 * WIDTH)));
typedef float loose_floats __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef int32_t loose_integers __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef uint16_t loose_halves __attribute__((vector_size(2 * WIDTH), aligned(2), may_alias));

typedef struct { float_part p[PARTS]; } floats;
typedef struct { integer_part p[PARTS]; } integers;

/* A vector whose part i is this expression. Compilers keep it in registers, since the loop is unrolled. */
#define EACH_PART(type, expression) ({ \
    type each_; \
    _Pragma("GCC unroll 4") for (int i = 0; i < PARTS; i++) each_.p[i] = (expression); \
    each_; })

INLINE floats load(const float *x) { return EACH_PART(floats, *(const loose_floats *)(x + WIDTH * i)); }
INLINE integers load_integers(const int32_t *x) { return EACH_PART(integers, *(const loose_integers *)(x + WIDTH * i)); }
INLINE void store(float *y, floats x)
{
    _Pragma("GCC unroll 4") for (int i = 0; i < PARTS; i++) *(loose_floats *)(y + WIDTH * i) = x.p[i];
}
INLINE void store_integers(int32_t *y, integers x)
{
    _Pragma("GCC unroll 4") for (int i = 0; i < PARTS; i++) *(loose_integers *)(y + WIDTH * i) = x.p[i];
}
INLINE floats all(float x) { return EACH_PART(floats, x - (float_part){0}); }
INLINE integers all_integers(int32_t x) { return EACH_PART(integers, x - (integer_part){0}); }
INLINE floats add(floats x, floats y) { return EACH_PART(floats, x.p[i] + y.p[i]); }
INLINE floats subtract(floats x, floats y) { return EACH_PART(floats, x.p[i] - y.p[i]); }
INLINE floats multiply(floats x, floats y) { return EACH_PART(floats, x.p[i] * y.p[i]); }
INLINE floats divide(floats x, floats y) { return EACH_PART(floats, x.p[i] / y.p[i]); }
INLINE integers add_integers(integers x, integers y) { return EACH_PART(integers, x.p[i] + y.p[i]); }
INLINE integers subtract_integers(integers x, integers y) { return EACH_PART(integers, x.p[i] - y.p[i]); }
INLINE integers shift_left(integers x, int count) { return EACH_PART(integers, x.p[i] << count); }
INLINE floats to_floats(integers x) { return EACH_PART(floats, __builtin_convertvector(x.p[i], float_part)); }
/* rounds towards zero */
INLINE integers to_integers(floats x) { return EACH_PART(integers, __builtin_convertvector(x.p[i], integer_part)); }
INLINE integers bits_of(floats x) { return EACH_PART(integers, (integer_part)x.p[i]); }
INLINE floats of_bits(integers x) { return EACH_PART(floats, (float_part)x.p[i]); }
/* all bits of a lane where x < y, else none; none where one is NaN */
INLINE integers is_less(floats x, floats y) { return EACH_PART(integers, (integer_part)(x.p[i] < y.p[i])); }
INLINE floats choose(integers mask, floats yes, floats no)
{
    return EACH_PART(floats, (float_part)((mask.p[i] & (integer_part)yes.p[i]) | (~mask.p[i] & (integer_part)no.p[i])));
}
/* y where one is NaN */
#if defined(__x86_64__)
INLINE floats larger(floats x, floats y) { return EACH_PART(floats, OF_REGISTER(max_ps)(x.p[i], y.p[i])); }
INLINE floats smaller(floats x, floats y) { return EACH_PART(floats, OF_REGISTER(min_ps)(x.p[i], y.p[i])); }
#else
INLINE floats larger(floats x, floats y) { return choose(is_less(y, x), x, y); }
INLINE floats smaller(floats x, floats y) { return choose(is_less(x, y), x, y); }
#endif
INLINE floats absolute(floats x) { return EACH_PART(floats, (float_part)((integer_part)x.p[i] & 0x7FFFFFFF)); }

/* x * y + z, rounded once where the tier has FMA */
INLINE floats multiply_add(floats x, floats y, floats z)
{
#if defined(__x86_64__) && WIDTH > 4
    return EACH_PART(floats, OF_REGISTER(fmadd_ps)(x.p[i], y.p[i], z.p[i]));
#elif defined(__aarch64__)
    return EACH_PART(floats, (float_part)vfmaq_f32((float32x4_t)z.p[i], (float32x4_t)x.p[i], (float32x4_t)y.p[i]));
#else
    return EACH_PART(floats, x.p[i] * y.p[i] + z.p[i]);
#endif
}

/* the sum of all lanes: half of them onto the other half, 8, 4, 2, 1 */
INLINE float sum_of(floats x)
{
    for (int half = PARTS / 2; half; half /= 2)
        for (int i = 0; i < half; i++)
            x.p[i] += x.p[half + i];
#if WIDTH == 16
    const __m256 eight = _mm512_castps512_ps256(x.p[0]) + _mm512_extractf32x8_ps(x.p[0], 1);
#elif WIDTH == 8
    const __m256 eight = x.p[0];
#endif
#if WIDTH > 4
    const __m128 four = _mm256_castps256_ps128(eight) + _mm256_extractf128_ps(eight, 1);
#else
    const float_part four = x.p[0];
#endif
    return (four[0] + four[2]) + (four[1] + four[3]);
}

INLINE float_part larger_part(float_part x, float_part y)
{
#if defined(__x86_64__)
    return OF_REGISTER(max_ps)(x, y);
#else
    return vmaxq_f32(x, y);
#endif
}

INLINE float largest_of(floats x)
{
    for (int half = PARTS / 2; half; half /= 2)
        for (int i = 0; i < half; i++)
            x.p[i] = larger_part(x.p[i], x.p[half + i]);
#if WIDTH == 16
    const __m256 eight = _mm256_max_ps(_mm512_castps512_ps256(x.p[0]), _mm512_extractf32x8_ps(x.p[0], 1));
#elif WIDTH == 8
    const __m256 eight = x.p[0];
#endif
#if WIDTH > 4
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
#else
    const float_part four = x.p[0];
#endif
    const float even = four[0] > four[2] ? four[0] : four[2], odd = four[1] > four[3] ? four[1] : four[3];
    return even > odd ? even : odd;
}

/* the first count numbers, rest in the other lanes: nothing behind them is read */
INLINE floats load_some(const float *x, int64_t count, float rest)
{
    float lanes[LANES];
    for (int64_t i = 0; i < LANES; i++)
        lanes[i] = i < count ? x[i] : rest;
    return load(lanes);
}
INLINE void store_some(float *y, floats x, int64_t count)
{
    float lanes[LANES];
    store(lanes, x);
    for (int64_t i = 0; i < count; i++)
        y[i] = lanes[i];
}

/* bfloat16 is the upper half of a float32 */
INLINE floats load_bfloat16(const uint16_t *x)
{
    return EACH_PART(floats, (float_part)(
        __builtin_convertvector((half_part)*(const loose_halves *)(x + WIDTH * i), integer_part) << 16));
}
/* to nearest, ties to even; NaN stays NaN */
INLINE void store_bfloat16(uint16_t *y, floats x)
{
    _Pragma("GCC unroll 4") for (int i = 0; i < PARTS; i++) {
        const integer_part bits = (integer_part)x.p[i], is_nan = (bits & 0x7FFFFFFF) > 0x7F800000;
        const integer_part upper = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF;
        *(loose_halves *)(y + WIDTH * i) =
            __builtin_convertvector((is_nan & 0x7FC0) | (~is_nan & upper), half_part);
    }
}

#endif
