/* Activation functions of gated units; include tier.h first.
 *
 * To the bit those of gating.py on tiers with FMA, so that a unit is the same whichever kernel gates it.
 */
#ifndef ACTIVATIONS_H
#define ACTIVATIONS_H

#include "vectors.h"

#define LOG2_OF_E 1.4426950408889634f

/* 2^x, at most 2^125 and at least 2^-125; NaN for NaN. Taylor's polynomial of degree 6, on -1/2 to 1/2. */
INLINE floats power_of_two(floats x)
{
    const floats to_integer = all(12582912.0f); /* 1.5 * 2^23: a sum with it is rounded to an integer */
    x = smaller(all(125.0f), larger(all(-125.0f), x));
    const floats n = subtract(add(x, to_integer), to_integer), r = subtract(x, n);
    floats power = all(0x1.4309120p-13f);
    power = multiply_add(power, r, all(0x1.5d87fep-10f));
    power = multiply_add(power, r, all(0x1.3b2ab6p-7f));
    power = multiply_add(power, r, all(0x1.c6b08ep-5f));
    power = multiply_add(power, r, all(0x1.ebfbe0p-3f));
    power = multiply_add(power, r, all(0x1.62e430p-1f));
    power = multiply_add(power, r, all(1.0f));
    return of_bits(add_integers(bits_of(power), shift_left(to_integers(n), 23)));
}

/* x / (1 + power) by a reciprocal: its bits to one part in eight, then three steps of Newton's method. 0 from 2^125 on,
 * whose reciprocal would leave the range of float32. */
INLINE floats over_one_and(floats x, floats power)
{
    const floats d = add(power, all(1.0f)), negative = subtract(all(-0.0f), d);
    floats r = of_bits(subtract_integers(all_integers(0x7EF311C7), bits_of(d)));
    for (int step = 0; step < 3; step++)
        r = multiply(r, multiply_add(negative, r, all(2.0f)));
    return multiply(x, choose(is_less(d, all(0x1p125f)), r, all(0.0f)));
}

/* x times the logistic function of x (Elfwing et al. 2018) */
INLINE floats silu(floats x)
{
    return over_one_and(x, power_of_two(multiply(x, all(-LOG2_OF_E))));
}

/* GELU's approximation by tanh (Hendrycks and Gimpel 2016): with u = sqrt(2 / pi) (x + 0.044715 x^3),
 * x (1 + tanh u) / 2 = x / (1 + e^-2u) */
INLINE floats gelu(floats x)
{
    const floats factor = multiply_add(multiply(x, x), all(-0.0713548163f), all(-1.5957691216f)); /* -2u / x */
    return over_one_and(x, power_of_two(multiply(multiply(x, factor), all(LOG2_OF_E))));
}

#endif
