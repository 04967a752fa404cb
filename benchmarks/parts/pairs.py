"""Two sides measured in alternating rounds: a machine's speed drifts, so only adjacent rounds are compared.

Each pair is one round of each side, and every second pair begins with the other side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.parts.figures import median, table

Round = Callable[[], float]
"""Runs one round of one side; returns its figure, for example output tokens/s."""


@dataclass
class Pairs:
    """The figures of two sides; ``left[i]`` and ``right[i]`` are adjacent rounds."""

    names: tuple[str, str]
    unit: str
    left: list[float] = field(default_factory=list)
    right: list[float] = field(default_factory=list)

    @property
    def ratios(self) -> list[float]:
        """left / right of each pair."""
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
        """A line for each side and one for the ratio: median, minimum and maximum."""
        left, right = self.names
        lines = [
            (f"{left} [{self.unit}]", self.left),
            (f"{right} [{self.unit}]", self.right),
            (f"{left} / {right} [x]", self.ratios),
        ]
        rows = [(name, median(samples), min(samples), max(samples)) for name, samples in lines]
        return table(("", "median", "min", "max"), rows)


def alternate(names: tuple[str, str], sides: tuple[Round, Round], *, num_pairs: int, unit: str) -> Pairs:
    """Run both sides ``num_pairs`` times in alternation. The caller warms them up."""
    pairs = Pairs(names, unit)
    results = (pairs.left, pairs.right)
    for number in range(num_pairs):
        for side in (0, 1) if number % 2 == 0 else (1, 0):
            results[side].append(sides[side]())
    return pairs
