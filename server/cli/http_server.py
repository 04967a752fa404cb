"""uvicorn's server, with a shutdown that drains.

The first SIGTERM or SIGINT lets running requests end while new ones get a 503, on a port that still listens. At the
end of the time, or at a second signal, the running ones are ended with an error. The exit status tells which it was.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator
from types import FrameType

import uvicorn

from server.api.lifecycle import Lifecycle
from server.engine.async_engine import AsyncEngine
from server.errors import ShuttingDown

logger = logging.getLogger("quickchange")

CUT_STATUS = 3
"""Exit status after requests were ended because ``--shutdown-timeout`` was over."""
SIGNALS = (signal.SIGINT, signal.SIGTERM)
_FLUSH_SECONDS = 1.0
"""Seconds to send the errors of requests that are ended."""
_POLL_SECONDS = 0.05


class HttpServer(uvicorn.Server):
    """``exit_status`` is valid after ``run``."""

    def __init__(
        self, config: uvicorn.Config, *, lifecycle: Lifecycle, engine: AsyncEngine, drain_seconds: float
    ) -> None:
        super().__init__(config)
        self._lifecycle = lifecycle
        self._engine = engine
        self._drain_seconds = drain_seconds
        self._second_signal: int | None = None
        self._drained = False
        self.exit_status = 0

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals until the end, also those that this process was started to ignore.

        uvicorn raises the signal again at its end; here the exit status tells what has happened.
        """
        before = {number: signal.signal(number, self.handle_exit) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal begins to drain, a second one ends it, or what is left to do after it."""
        if self._drained:
            _exit_now(self.exit_status)
        if self.should_exit:
            self._second_signal = sig
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain, then stop listening and end the application."""
        self._lifecycle.draining = True
        logger.info(
            "stopping; running requests: %d, with %.0f s to end; a second signal ends them at once",
            self._lifecycle.num_requests,
            self._drain_seconds,
        )
        await self._wait_until_idle(self._drain_seconds)
        num_cut = self._lifecycle.num_requests
        if num_cut:
            logger.warning("running requests ended with an error: %d", num_cut)
            self.exit_status = CUT_STATUS
            self._engine.fail_all(ShuttingDown())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_FLUSH_SECONDS):
                    while self._lifecycle.num_requests:
                        await asyncio.sleep(_POLL_SECONDS)
            if self._second_signal is not None:
                _exit_now(128 + self._second_signal)
        self._drained = True
        await super().shutdown(sockets)

    async def _wait_until_idle(self, seconds: float) -> None:
        deadline = asyncio.get_running_loop().time() + seconds
        while self._lifecycle.num_requests and self._second_signal is None:
            if asyncio.get_running_loop().time() >= deadline:
                return
            await asyncio.sleep(_POLL_SECONDS)


def _exit_now(status: int) -> None:
    """End the process without waiting for the engine's current step, which may take long."""
    logging.shutdown()
    sys.stdout.flush()
    os._exit(status)
