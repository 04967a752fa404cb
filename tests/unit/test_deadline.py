"""Work that might not end by itself is broken off, in its own thread and only there, and only while it is watched."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from server.text.deadline import DeadlineExceeded, deadline


def spin(seconds: float) -> int:
    """Python code that does not look at a clock of ours, as a template's loops do not."""
    rounds, end = 0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        rounds += sum(range(50))
    return rounds


def watchers() -> int:
    """Threads that wait for a deadline."""
    return sum(isinstance(thread, threading.Timer) for thread in threading.enumerate())


def test_a_loop_is_broken_off() -> None:
    since = time.perf_counter()
    with pytest.raises(DeadlineExceeded), deadline(0.05):
        spin(30)
    assert time.perf_counter() - since < 5


def test_work_that_is_done_in_time_is_left_alone() -> None:
    with deadline(0.05):
        rounds = spin(0)
    assert rounds == 0
    spin(0.15)  # past the deadline, outside the block


def test_a_call_into_c_is_broken_off_when_it_returns() -> None:
    since = time.perf_counter()

    def work() -> None:
        time.sleep(0.1)
        spin(30)

    with pytest.raises(DeadlineExceeded), deadline(0.02):
        work()
    assert 0.1 <= time.perf_counter() - since < 5


def test_the_works_own_error_comes_out_as_it_is() -> None:
    with pytest.raises(KeyError), deadline(0.05):
        raise KeyError
    spin(0.1)


def test_code_that_swallows_errors_is_broken_off_all_the_same() -> None:
    """jinja2 took what came while it folded constants for a sign that they are none, and the loop ran to its end."""

    def stubborn() -> None:
        while True:
            with contextlib.suppress(Exception):
                spin(30)

    with pytest.raises(DeadlineExceeded), deadline(0.05):
        stubborn()
    template = "{{ ('ab ' * 3000000)|wordwrap(10)|length }}"
    since = time.perf_counter()
    with pytest.raises(DeadlineExceeded), deadline(0.05):
        ImmutableSandboxedEnvironment().from_string(template).render()
    assert time.perf_counter() - since < 5


@pytest.mark.parametrize(("outer", "inner"), [(0.05, 30), (30, 0.05)])
def test_of_nested_deadlines_the_earlier_one_counts(outer: float, inner: float) -> None:
    since = time.perf_counter()
    with pytest.raises(DeadlineExceeded), deadline(outer), deadline(inner):
        spin(30)
    assert time.perf_counter() - since < 5


def test_a_deadline_inside_another_leaves_that_one_as_it_is() -> None:
    broken_off = []

    def work() -> None:
        try:
            with deadline(0.02):
                spin(30)
        except DeadlineExceeded:
            broken_off.append("inner")
        spin(30)

    with pytest.raises(DeadlineExceeded), deadline(0.2):
        work()
    assert broken_off == ["inner"]


def test_other_threads_are_not_disturbed() -> None:
    rounds: list[int] = []
    neighbour = threading.Thread(target=lambda: rounds.append(spin(0.3)))
    neighbour.start()
    with pytest.raises(DeadlineExceeded), deadline(0.05):
        spin(30)
    neighbour.join()
    assert rounds[0] > 0


def test_each_thread_has_a_deadline_of_its_own() -> None:
    def work(seconds: float) -> str:
        try:
            with deadline(seconds):
                spin(0.2)
        except DeadlineExceeded:
            return "broken off"
        return "done"

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(work, [0.02, 30, 0.05, 30])) == ["broken off", "done", "broken off", "done"]
        assert list(threads.map(work, [30] * 4)) == ["done"] * 4  # the threads are as good as new


@pytest.fixture
def _quick_threads() -> Iterator[None]:
    """Threads take turns at once, not after five milliseconds."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("_quick_threads")
def test_a_deadline_that_ends_together_with_the_work_never_fires_later() -> None:
    """The exception comes inside the block or not at all, however close the two are."""
    outcomes: dict[str, int] = {"in time": 0, "broken off": 0}
    for number in range(300):
        try:
            with deadline(0.001):
                spin(number % 6 * 0.0005)
            outcomes["in time"] += 1
        except DeadlineExceeded:
            outcomes["broken off"] += 1
        spin(0.0005)
    assert min(outcomes.values()) > 0, outcomes


def test_many_quick_uses_leave_no_threads() -> None:
    before = watchers()
    for _ in range(300):
        with deadline(60):
            spin(0)
    end = time.perf_counter() + 5
    while watchers() > before and time.perf_counter() < end:
        time.sleep(0.01)
    assert watchers() == before


def test_what_is_broken_off_is_cleaned_up() -> None:
    trace = []

    def work() -> None:
        try:
            spin(30)
        finally:
            trace.append("cleaned up")

    with pytest.raises(DeadlineExceeded), deadline(0.05):
        work()
    assert trace == ["cleaned up"]
