"""What requests have freed goes back to the system when the server is idle.

glibc keeps freed memory for the next allocation (``allocation``), in a heap for each thread that was ever busy.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from server.api.lifecycle import Lifecycle

INTERVAL = 10.0


async def return_freed_memory(lifecycle: Lifecycle, trim: Callable[[], None], *, interval: float = INTERVAL) -> None:
    """Call ``trim`` in a thread where no request is being answered, once after any number of requests."""
    num_trimmed = 0
    while True:
        await asyncio.sleep(interval)
        num_begun = lifecycle.num_begun
        if lifecycle.num_requests == 0 and num_begun != num_trimmed:
            num_trimmed = num_begun
            await asyncio.to_thread(trim)
