"""Progress of reading weights: a line now and then on stderr, none for what takes a few seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

QUIET_SECONDS, SECONDS_BETWEEN_LINES, SECONDS_BETWEEN_UPDATES = 3.0, 10.0, 0.5


class LoadProgress:
    """Counts up to ``total`` and prints the share in percent.

    On a terminal the line is rewritten; elsewhere there is a new line every 10 seconds. ``start`` counts anew. As a
    context manager it finishes at the end, also after an error.
    """

    def __init__(
        self,
        label: str,
        total: int,
        *,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._total, self._has_line = total, False
        self._stream, self._clock = stream or sys.stderr, clock
        self._is_terminal = self._stream.isatty()
        self.start(label)

    def start(self, label: str) -> None:
        self.finish()
        self.label, self._count = label, 0
        self._next = self._clock() + QUIET_SECONDS

    def add(self, count: int) -> None:
        self._count += count
        if self._clock() >= self._next:
            self._print(100 * self._count // max(1, self._total))

    def _print(self, percent: int) -> None:
        interval = SECONDS_BETWEEN_UPDATES if self._is_terminal else SECONDS_BETWEEN_LINES
        self._next = self._clock() + interval
        text = f"{self.label}: {min(percent, 100)} %"
        print(f"\r{text}" if self._is_terminal else text, file=self._stream, end="" if self._is_terminal else "\n")
        self._stream.flush()
        self._has_line = self._is_terminal

    def __enter__(self) -> LoadProgress:
        return self

    def __exit__(self, *exception: object) -> None:
        self.finish()

    def finish(self) -> None:
        """End the line of a terminal, so that what follows has its own."""
        if self._has_line:
            print(file=self._stream, flush=True)
        self._has_line = False
