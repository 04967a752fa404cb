"""Random numbers that are a function of a seed and a position, whatever else was drawn before.

Bits are SplitMix64's (Steele et al. 2014): of a stream and a key alone, so that any of them can be had by itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_BITS = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def stream(seed: int, number: int, attempt: int = 0) -> int:
    """The stream, 64 bits, of the ``number``-th token of a seed; rejection sampling takes one for each ``attempt``."""
    state = _mix(_mix(seed) + (number + 1) * _GOLDEN)
    return _mix(state + attempt * _GOLDEN) if attempt else state


def exponentials(streams: Sequence[int], keys: NDArray[np.int64]) -> NDArray[np.float64]:
    """Exponential random numbers [rows, n] of mean 1, for the keys [n] or [rows, n] of each stream."""
    states = np.array(streams, dtype=np.uint64)[:, None] + (keys.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN)
    for shift, factor in zip((30, 27), _FACTORS, strict=True):
        states = (states ^ (states >> np.uint64(shift))) * np.uint64(factor)
    states ^= states >> np.uint64(31)
    uniform = ((states >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53  # 0 < uniform < 1
    numbers: NDArray[np.float64] = -np.log(uniform)
    return numbers


def _mix(state: int) -> int:
    state &= _BITS
    state = ((state ^ (state >> 30)) * _FACTORS[0]) & _BITS
    state = ((state ^ (state >> 27)) * _FACTORS[1]) & _BITS
    return state ^ (state >> 31)
