"""MXFP4: 4-bit floats in blocks of 32 that share a scale, as ggml and GPT-OSS's safetensors store them.

A value is e2m1 (sign, two bits of exponent, one of mantissa) times its block's scale, a power of two as e8m0 (an
exponent without sign). The source is the OCP Microscaling Formats specification 1.0. The containers differ in which
half of a byte comes first, and that is theirs to know.

As in ggml, values stand doubled, as integers, and scales halved, so that every product is exact in float32.
"""

from __future__ import annotations

import numpy as np

DOUBLED_VALUES = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)
"""Twice the e2m1 number of each code, int8 [16]."""

HALF_SCALES = np.ldexp(np.float32(1), np.arange(256, dtype=np.int32) - 128)
"""Half of ``2 ** (exponent - 127)`` for each e8m0 exponent, float32 [256]."""
