"""Freed memory goes back to the system while nobody waits for an answer, once after any number of requests."""

from __future__ import annotations

import asyncio
import contextlib

from server.api.lifecycle import Lifecycle
from server.cli.freed_memory import return_freed_memory


async def trims(lifecycle: Lifecycle) -> int:
    """How often memory is returned while the interval passes many times."""
    calls: list[None] = []
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(0.2):
            await return_freed_memory(lifecycle, lambda: calls.append(None), interval=0.01)
    return len(calls)


def test_memory_is_returned_once_after_requests_and_never_while_one_is_answered() -> None:
    lifecycle = Lifecycle()
    assert asyncio.run(trims(lifecycle)) == 0
    lifecycle.num_begun = 3
    assert asyncio.run(trims(lifecycle)) == 1
    lifecycle.num_requests = 1
    assert asyncio.run(trims(lifecycle)) == 0
