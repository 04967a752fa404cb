"""Finds the known field that a misspelled name is one edit away from: a letter more, less, other, or two swapped."""

from __future__ import annotations

from collections.abc import Iterable

MIN_LENGTH = 4
"""Shorter fields are not compared: every name of one letter is one edit away from ``n``."""


class Spelling:
    """Known names, indexed by what is left of them without one of their letters."""

    def __init__(self, names: Iterable[str]) -> None:
        self._by_rest: dict[str, list[str]] = {}
        for name in sorted(names):
            if len(name) >= MIN_LENGTH:
                for rest in _rests(name):
                    self._by_rest.setdefault(rest, []).append(name)
        self._longest = max(map(len, self._by_rest), default=0) + 1

    def intended(self, name: str) -> str | None:
        """The known name that ``name`` is one edit away from; the first in the alphabet of several."""
        if len(name) > self._longest:
            return None
        near = {known for rest in _rests(name) for known in self._by_rest.get(rest, ())}
        return min((known for known in near if _is_one_edit(name, known)), default=None)


def _rests(name: str) -> set[str]:
    """The name, and the name without each of its letters."""
    return {name, *(name[:i] + name[i + 1 :] for i in range(len(name)))}


def _is_one_edit(name: str, known: str) -> bool:
    """Whether one letter is inserted, deleted or replaced, or two adjacent letters are swapped."""
    shorter, longer = sorted((name, known), key=len)
    start = _num_equal(shorter, longer)
    end = _num_equal(shorter[start:][::-1], longer[start:][::-1])
    changed, instead = shorter[start : len(shorter) - end], longer[start : len(longer) - end]
    if len(instead) <= 1:
        return changed != instead
    return len(changed) == len(instead) == 2 and changed == instead[::-1]


def _num_equal(left: str, right: str) -> int:
    """The length of the common beginning."""
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
