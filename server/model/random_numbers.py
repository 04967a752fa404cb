"""Random numbers that are a function of a seed and a position, whatever else was drawn before."""

from __future__ import annotations

_BITS = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15


def uniform(seed: int, number: int, attempt: int = 0) -> float:
    """The ``number``-th random number of a seed, in [0, 1) with 53 bits (SplitMix64, Steele et al. 2014).

    ``attempt`` counts further ones for the same number, as many as rejection sampling needs.
    """
    bits = _mix(_mix(seed) + (number + 1) * _GOLDEN)
    if attempt:
        bits = _mix(bits + attempt * _GOLDEN)
    return (bits >> 11) * 2.0**-53


def _mix(state: int) -> int:
    state &= _BITS
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _BITS
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _BITS
    return state ^ (state >> 31)
