"""Reading a large base shows progress: a line that is rewritten on a terminal, a few plain lines elsewhere."""

from __future__ import annotations

import io
from contextlib import suppress

import pytest

from base_files.load_progress import LoadProgress
from tests.terminal import Terminal


class Clock:
    """``now`` is set by the test."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_what_takes_a_few_seconds_is_silent() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = LoadProgress("reading weights", 100, stream=stream, clock=clock)
    for clock.now in (0.5, 1.5, 2.9):
        progress.add(30)
    progress.finish()
    assert stream.getvalue() == ""


def test_lines_in_a_log_are_plain_and_few() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = LoadProgress("reading weights", 100, stream=stream, clock=clock)
    for clock.now in range(1, 21):
        progress.add(5)
    progress.finish()
    assert stream.getvalue() == "reading weights: 15 %\nreading weights: 65 %\n"


@pytest.mark.parametrize("error", [None, OSError])
def test_a_terminals_line_is_ended_behind_a_block_also_after_an_error(error: type[OSError] | None) -> None:
    """What is logged next stood on the line of the progress."""
    stream, clock = Terminal(), Clock()
    with suppress(OSError), LoadProgress("reading weights", 100, stream=stream, clock=clock) as progress:
        clock.now = 4.0
        progress.add(20)
        if error is not None:
            raise error
    assert stream.getvalue() == "\rreading weights: 20 %\n"


def test_a_terminals_line_is_rewritten_and_ended() -> None:
    stream, clock = Terminal(), Clock()
    progress = LoadProgress("reading weights", 100, stream=stream, clock=clock)
    for clock.now in (4.0, 5.0):
        progress.add(20)
    progress.start("quantizing weights")
    clock.now = 9.0
    progress.add(30)
    progress.finish()
    assert stream.getvalue() == "\rreading weights: 20 %\rreading weights: 40 %\n\rquantizing weights: 30 %\n"
