"""Waiting sequences in a fair order: owners in turn, then each owner's adapters in turn, then order of arrival."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from server.sequence import LoRARequest, Sequence

_Line = tuple[str, tuple[LoRARequest, ...]]
"""An owner and the adapters of a request: sequences of one line start in order of arrival."""

_MAX_LAST_STARTS = 1024
"""Owners and lines that are remembered although none of their sequences waits."""


class FairQueue:
    """Sequences that wait for a slot; iteration is in order of arrival.

    The owner with the fewest running sequences is next, among equals the one whose last start is longest ago; of its
    adapters the one whose last start is longest ago. Max-min fairness over slots (Bertsekas and Gallager 1992, 6.5.2).
    """

    def __init__(self) -> None:
        self._sequences: dict[int, Sequence] = {}  # by id, in order of arrival
        self._lines: dict[_Line, dict[int, Sequence]] = {}
        self._last_starts: dict[str | _Line, int] = {}
        self._clock = 0

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences.values())

    def append(self, sequence: Sequence) -> None:
        self._sequences[sequence.id] = sequence
        self._lines.setdefault(_line(sequence), {})[sequence.id] = sequence

    def remove(self, sequence_id: int) -> Sequence | None:
        """Remove a sequence; None if it does not wait."""
        sequence = self._sequences.pop(sequence_id, None)
        if sequence is not None:
            line = self._lines[_line(sequence)]
            del line[sequence_id]
            if not line:
                del self._lines[_line(sequence)]
        if not self._sequences:
            self._last_starts.clear()
        return sequence

    def start(self, sequence: Sequence) -> None:
        """Remove a sequence because it starts: its owner and its adapters are last in turn now."""
        self._clock += 1
        self._last_starts[sequence.owner] = self._last_starts[_line(sequence)] = self._clock
        self.remove(sequence.id)
        if len(self._last_starts) > _MAX_LAST_STARTS + 2 * len(self._lines):
            waiting = {*self._lines, *(owner for owner, _ in self._lines)}
            self._last_starts = {key: start for key, start in self._last_starts.items() if key in waiting}

    def next(self, num_running: Mapping[str, int], *, skipped: Collection[int] = ()) -> Sequence | None:
        """The sequence that starts next, given the running sequences of each owner; ``skipped`` are ids."""
        best: Sequence | None = None
        best_rank: tuple[int, int, int] | None = None
        for line, sequences in self._lines.items():
            owner = line[0]
            rank = (num_running.get(owner, 0), self._last_starts.get(owner, 0), self._last_starts.get(line, 0))
            if best_rank is not None and rank >= best_rank:
                continue
            first = next((sequence for sequence in sequences.values() if sequence.id not in skipped), None)
            if first is not None:
                best, best_rank = first, rank
        return best


def _line(sequence: Sequence) -> _Line:
    return sequence.owner, sequence.adapters
