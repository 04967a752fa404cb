"""SIGHUP: the key file and the aliases are read again, without a restart.

It is also what the kernel sends when a terminal is closed. A server that was started on a terminal then stops, as any
command does, unless SIGHUP was ignored before it started (``nohup``).
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from types import FrameType
from typing import TYPE_CHECKING

from server.api.auth.access import Access
from server.cli.access import read_keys
from server.errors import SettingsError
from server.settings import Settings

if TYPE_CHECKING:  # it imports torch, during which a signal must not end the process
    from server.adapters.watcher import AdapterWatcher

logger = logging.getLogger("quickchange")


class Reloader:
    """Reads keys and aliases again at a signal. What cannot be read is logged, and what was there before stays."""

    def __init__(self, settings: Settings, access: Access) -> None:
        self._settings, self._access = settings, access
        self._watcher: AdapterWatcher | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._in_order = asyncio.Lock()
        self._is_early = False
        self._stops_with_terminal = False

    def start(self, watcher: AdapterWatcher) -> None:
        """Reload on the running event loop, at once if a signal came while the base was loaded."""
        self._watcher, self._loop = watcher, asyncio.get_running_loop()
        if self._is_early:
            self._start()

    def listen(self) -> None:
        """From the main thread."""
        self._stops_with_terminal = signal.getsignal(signal.SIGHUP) is signal.SIG_DFL and has_terminal()
        signal.signal(signal.SIGHUP, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._stops_with_terminal and not has_terminal():
            signal.raise_signal(signal.SIGTERM)
        elif self._loop is None:
            self._is_early = True
        elif not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._start)

    def _start(self) -> None:
        task = asyncio.ensure_future(self.reload())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def reload(self) -> None:
        async with self._in_order:
            await self._reload()

    async def _reload(self) -> None:
        try:
            keys = await asyncio.to_thread(read_keys, self._settings)
        except SettingsError as error:
            logger.error("%s; the keys before it stay", error)
        else:
            self._access.replace_keys(keys)
            logger.info("SIGHUP: %d API keys read", len(keys.keys))
        if self._watcher is not None:
            await self._watcher.read_aliases_again()


def has_terminal() -> bool:
    """Whether this process has a controlling terminal, which it loses when the terminal is closed."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True
