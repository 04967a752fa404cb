"""What a burst of requests has taken goes back to the system once the server has been idle for a while.

Cached prefixes are reduced to those of one full batch. glibc keeps freed memory for the next allocation
(``allocation``), in a heap for each thread that was ever busy: a trim returns it.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable

from server.api.lifecycle import Lifecycle

INTERVAL = 15.0
"""Seconds between two looks. Without a request from one to the next, the server is idle."""
_CACHE_SECONDS = 1.0
"""Seconds for the engine to release cached prefixes before the trim."""


async def return_freed_memory(
    lifecycle: Lifecycle,
    release_cached: Callable[[], None],
    trim: Callable[[], None],
    *,
    interval: float = INTERVAL,
) -> None:
    """Call ``release_cached`` and, in a thread, ``trim`` in each idle time that follows requests."""
    num_seen, num_trimmed = lifecycle.num_begun, 0
    while True:
        await asyncio.sleep(interval)
        is_idle = lifecycle.num_requests == 0 and lifecycle.num_begun == num_seen
        num_seen = lifecycle.num_begun
        if is_idle and num_seen != num_trimmed:
            num_trimmed = num_seen
            release_cached()
            await asyncio.sleep(min(interval, _CACHE_SECONDS))
            await asyncio.to_thread(_collect, trim)


def _collect(trim: Callable[[], None]) -> None:
    gc.collect()
    trim()
