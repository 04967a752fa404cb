/* e to the x; include tier.h first. */
#ifndef EXPONENTIAL_H
#define EXPONENTIAL_H

#include "vectors.h"

/* e to the x in each lane, to one unit in the last place, exact at 0; 0 below -87.7, infinity above 88.4, NaN for NaN.
 *
 * e^x = 2^n e^r with n the integer nearest to x / ln 2 and r at most ln 2 / 2, which takes ln 2 in two parts (Cody and
 * Waite 1980). e^r is 1 + r + r^2 q(r), q by Remez's algorithm: off by 0.03 units.
 */
INLINE floats exponential(floats x)
{
    const floats to_integer = all(12582912.0f); /* 1.5 * 2^23: a sum with it is rounded to an integer, in its low bits */
    const floats limited = smaller(all(89.0f), larger(all(-88.0f), x)); /* x where it is NaN */
    const floats shifted = multiply_add(limited, all(0x1.715476p+0f), to_integer);
    const floats n = subtract(shifted, to_integer);
    floats r = multiply_add(n, all(-0x1.63p-1f), limited); /* exact: n has 8 bits, the factor 10 */
    r = multiply_add(n, all(0x1.bd0106p-13f), r);
    floats q = all(0x1.6a2434p-10f);
    q = multiply_add(q, r, all(0x1.1239e2p-7f));
    q = multiply_add(q, r, all(0x1.5558f2p-5f));
    q = multiply_add(q, r, all(0x1.555492p-3f));
    q = multiply_add(q, r, all(0x1.fffffcp-2f));
    const floats power = add(multiply_add(multiply(r, r), q, r), all(1.0f));
    /* the exponent's bits are all clear at n = -127, which makes 0, and all set at n = 128: infinity */
    const floats scale = of_bits(shift_left(add_integers(bits_of(shifted), all_integers(127)), 23));
    return multiply(power, scale);
}

#endif
