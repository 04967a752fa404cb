"""Closed loop (a fixed number of clients) and open loop (arrivals at a rate)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator

from benchmarks.parts.jobs import Job
from benchmarks.parts.requests import Record

Send = Callable[[Job], Awaitable[Record]]


class Budget:
    """When to stop asking: after so many jobs, or so many seconds from the first one, whichever comes first."""

    def __init__(self, jobs: Iterator[Job], *, num_requests: int | None, seconds: float | None) -> None:
        assert num_requests is not None or seconds is not None, "a load needs an end"
        self._jobs, self._left, self._seconds = jobs, num_requests, seconds
        self.since = time.perf_counter()

    def next(self) -> Job | None:
        if self._left == 0 or (self._seconds is not None and time.perf_counter() - self.since >= self._seconds):
            return None
        if self._left is not None:
            self._left -= 1
        return next(self._jobs)

    def close(self) -> None:
        self._left = 0

    def covers(self, at: float) -> bool:
        """Whether an arrival, in seconds from the start, still counts."""
        return self._seconds is None or at < self._seconds


async def closed_loop(send: Send, budget: Budget, num_clients: int) -> list[Record]:
    """``num_clients`` clients, each sending the next job as soon as its last one is answered."""
    records: list[Record] = []

    async def client() -> None:
        while (job := budget.next()) is not None:
            records.append(await send(job))

    await asyncio.gather(*(client() for _ in range(num_clients)))
    return records


async def open_loop(send: Send, budget: Budget) -> list[Record]:
    """Send every job at its arrival time, whether or not earlier jobs are answered."""
    running: list[asyncio.Future[Record]] = []

    while (job := budget.next()) is not None and budget.covers(job.at):
        await asyncio.sleep(max(0.0, budget.since + job.at - time.perf_counter()))
        running.append(asyncio.ensure_future(send(job)))
    return list(await asyncio.gather(*running))
