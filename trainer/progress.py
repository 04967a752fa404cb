"""Progress output: on a terminal one line that is rewritten, elsewhere a line every few seconds."""

from __future__ import annotations

import sys
import time
from typing import TextIO

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Reports steps of a run of ``num_steps``."""

    def __init__(self, num_steps: int, stream: TextIO | None = None) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._num_steps = num_steps
        self._rewrites = self._stream.isatty()
        self._started = time.perf_counter()
        self._tokens = 0
        self._printed_at = 0.0

    def step(self, step: int, *, loss: float, tokens: int) -> None:
        """Step number ``step`` (from 1) had ``tokens`` tokens and a mean loss of ``loss``."""
        self._tokens += tokens
        now = time.perf_counter()
        elapsed = now - self._started
        if not self._rewrites and step < self._num_steps and now - self._printed_at < SECONDS_BETWEEN_LINES:
            return
        self._printed_at = now
        remaining = elapsed / step * (self._num_steps - step)
        self._write(
            f"step {step}/{self._num_steps}  loss {loss:.3f}  {self._tokens / elapsed:.0f} tokens/s  "
            f"{int(remaining) // 60}:{int(remaining) % 60:02d} left",
            last=step == self._num_steps,
        )

    def note(self, text: str) -> None:
        self._write(text, last=True)

    def _write(self, text: str, *, last: bool) -> None:
        if self._rewrites:
            self._stream.write(f"\r\x1b[K{text}" + ("\n" if last else ""))
        else:
            self._stream.write(text + "\n")
        self._stream.flush()
