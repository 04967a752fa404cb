"""Two sides measured in turn: a machine drifts, so only neighbours in time are compared.

Each pair is one round of each side, and every second pair begins with the other side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.parts.figures import median, table

Round = Callable[[], float]
"""One round of one side: its figure, more being better."""


@dataclass
class Pairs:
    """What the rounds of two sides gave, ``left[i]`` and ``right[i]`` being neighbours in time."""

    names: tuple[str, str]
    unit: str
    left: list[float] = field(default_factory=list)
    right: list[float] = field(default_factory=list)

    @property
    def ratios(self) -> list[float]:
        """Left by right, of each pair."""
        return [left / right for left, right in zip(self.left, self.right, strict=True)]

    def as_json(self) -> dict[str, Any]:
        return {
            "left": self.names[0],
            "right": self.names[1],
            "unit": self.unit,
            "left_rounds": self.left,
            "right_rounds": self.right,
            "median_left": median(self.left),
            "median_right": median(self.right),
            "ratios": self.ratios,
            "median_ratio": median(self.ratios),
        }

    def as_table(self) -> str:
        """A line for each side and one for the ratio: median, least and greatest."""
        rows = [
            (f"{name} [{unit}]", median(samples), min(samples), max(samples))
            for name, unit, samples in (
                (self.names[0], self.unit, self.left),
                (self.names[1], self.unit, self.right),
                (f"{self.names[0]} / {self.names[1]}", "x", self.ratios),
            )
        ]
        return table(("", "median", "least", "greatest"), rows)


def alternate(names: tuple[str, str], sides: tuple[Round, Round], *, num_pairs: int, unit: str) -> Pairs:
    """Run both sides ``num_pairs`` times in turn. Warming up is the caller's."""
    pairs = Pairs(names, unit)
    results = (pairs.left, pairs.right)
    for number in range(num_pairs):
        for side in (0, 1) if number % 2 == 0 else (1, 0):
            results[side].append(sides[side]())
    return pairs
