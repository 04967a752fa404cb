"""Freed memory goes back to the system while nobody waits for an answer, once after any number of requests."""

from __future__ import annotations

import asyncio
import contextlib

from server.api.lifecycle import Lifecycle
from server.cli.freed_memory import return_freed_memory


async def calls_while_time_passes(lifecycle: Lifecycle, *, begun: int = 0) -> list[str]:
    """What is called while the interval passes many times; ``begun`` requests begin, and end, after the first."""
    calls: list[str] = []
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(0.3):
            asyncio.get_running_loop().call_later(0.015, lambda: setattr(lifecycle, "num_begun", begun))
            await return_freed_memory(
                lifecycle, lambda: calls.append("release"), lambda: calls.append("trim"), interval=0.01
            )
    return calls


def test_memory_is_returned_once_after_requests_and_never_while_one_is_answered() -> None:
    assert asyncio.run(calls_while_time_passes(Lifecycle())) == []
    assert asyncio.run(calls_while_time_passes(Lifecycle(), begun=3)) == ["release", "trim"]
    busy = Lifecycle()
    busy.num_requests = 1
    assert asyncio.run(calls_while_time_passes(busy, begun=3)) == []
