"""Answers that repeat themselves: of a looping adapter most do, of a good one none or few."""

from __future__ import annotations

from collections.abc import Sequence

LOOP_LENGTH, MAX_PERIOD = 64, 32


def is_loop(ids: Sequence[int]) -> bool:
    """Whether the last ``LOOP_LENGTH`` tokens repeat with a period of at most ``MAX_PERIOD``: twice or more.

    A list whose numbers go up is none, however often it says the same. Nor is an answer that ends by itself behind the
    repetition, as far as its end token is among ``ids``.
    """
    end = ids[-LOOP_LENGTH:]
    if len(end) < LOOP_LENGTH:
        return False
    return any(end[period:] == end[:-period] for period in range(1, MAX_PERIOD + 1))
