"""Which rows of the current batch use which adapters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from server.sequence import AdapterUse, Batch

Run = tuple[int, int, tuple[AdapterUse, ...]]
"""Rows ``start`` to ``end`` of a batch that all use these adapters."""


class Rows:
    """The runs of the batch at hand; most modules see all its rows, the head only those that are sampled."""

    def __init__(self) -> None:
        self._runs: dict[int, Sequence[Run]] = {}

    def begin(self, batch: Batch) -> None:
        """Note the rows of each adapter for the forward pass that follows."""
        self._runs = {
            len(batch.sampling): _runs((sequence.adapters, 1) for sequence in batch.sampling),
            batch.num_rows: _runs((segment.sequence.adapters, segment.length) for segment in batch.segments),
        }

    def runs(self, num_rows: int) -> Sequence[Run]:
        """The runs of a module that got so many rows."""
        assert num_rows in self._runs, f"a module got {num_rows} rows of a batch of {list(self._runs)}"
        return self._runs[num_rows]


def _runs(lengths: Iterable[tuple[tuple[AdapterUse, ...], int]]) -> Sequence[Run]:
    runs: list[Run] = []
    start = 0
    for uses, group in groupby(lengths, key=lambda one: one[0]):
        end = start + sum(length for _, length in group)
        if uses:
            runs.append((start, end, uses))
        start = end
    return runs
