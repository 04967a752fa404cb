"""Scans the adapter folders, and has the registry updated: what appeared, changed or is gone.

A folder counts when nothing in it has changed for ``settle`` seconds, so that one still being copied is left alone; a
name is gone when its folder has been missing for ``grace`` seconds, so that one removed and put back is an update.
File system events bring a scan forward; without them there is a scan every ``settle`` seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import stat
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from watchfiles import awatch

from server.adapters.adapter_library import AdapterLibrary
from server.adapters.aliases import ALIASES_FILE, MAX_ALIASES_BYTES, parse_aliases
from server.adapters.content.folder import (
    FolderState,
    file_state,
    folder_state,
    follows_links,
    read_file,
    sub_folders,
)
from server.adapters.content.safe_open import leads_inside
from server.adapters.versions import VersionStore

logger = logging.getLogger("quickchange.adapters")

_PAUSE_PER_SCAN = 20
"""The shortest pause after a scan, in durations of a scan: with many folders, scans take 5 % of the time."""
_SLOW_SCAN = 5.0
"""Seconds; a scan that takes longer is logged as a warning."""


@dataclass(frozen=True)
class Found:
    """A folder as it was found; ``changed`` is when anything in it last did, in seconds since the epoch.

    ``inode`` is the folder's own, or that of the folder that a link leads to.
    """

    path: Path
    state: FolderState
    changed: float
    inode: int


class AdapterWatcher:
    """Watches ``folders``, the first of which wins where two hold the same name; the first need not exist yet."""

    def __init__(
        self,
        folders: Sequence[Path],
        adapters: AdapterLibrary,
        *,
        settle: float,
        grace: float,
        store: VersionStore | None = None,
    ) -> None:
        self.folders, self.settle, self.grace = tuple(folders), settle, grace
        self._adapters, self._sync, self._store = adapters, adapters.sync, store
        self._roots, self._linked = adapters.reader.roots, False
        self._seen: dict[str, tuple[Found, float]] = {}
        self._handled: dict[str, tuple[Path, FolderState]] = {}
        self._missing: dict[str, float] = {}
        self._hidden: dict[str, FolderState] = {}
        self._mounted: dict[str, Path] = {}
        self._aliases_state: FolderState | None = None
        self._pins_state: object = None
        self._durations = (0.0, 0.0)
        self._watchable: frozenset[tuple[Path, int]] = frozenset()
        self._watched: frozenset[tuple[Path, int]] = frozenset()
        self._listening: asyncio.Task[None] | None = None
        self._listening_since = -math.inf
        self._logged_errno: int | None = None
        self._has_events = False
        self._scanning = asyncio.Lock()

    async def start(self) -> None:
        """Read what is there. A folder that is just being copied gets a moment to settle."""
        await self._sync.reader.load_digests()
        deadline = time.monotonic() + 2 * self.settle
        while not await self.scan() and time.monotonic() < deadline:
            await asyncio.sleep(self.settle / 4)
        self._sync.end_start()

    async def run(self) -> None:
        try:
            while True:
                settled = await self._scan_and_report()
                gets_events = self._keep_listening() and not self._linked
                pause = 10 * self.settle if gets_events and settled else self.settle
                await self._wait(max(pause, _PAUSE_PER_SCAN * min(self._durations)))
        finally:
            if self._listening is not None:
                self._listening.cancel()

    async def scan(self, names: Collection[str] | None = None) -> bool:
        """Scan all folders, or those of some names. True where every folder had settled."""
        async with self._scanning:
            now = time.monotonic()
            try:
                found = await asyncio.to_thread(self._timed_read, names)
            except OSError as error:
                self._log_failure(error)
                return False
            self._logged_errno = None
            waiting = {name for name, folder in found.items() if not await self._apply(name, folder, now)}
            gone = {name for name in self._handled if name not in found and (names is None or name in names)}
            for name in gone:
                if now - self._missing.setdefault(name, now) >= self.grace:
                    self._forget(name)
            self._missing = {name: since for name, since in self._missing.items() if name not in found}
            sightings = {name: self._sighting(name, folder, now) for name, folder in found.items()}
            self._sync.pending = waiting | self._missing.keys()
            if names is not None:
                self._seen |= sightings
                return not self._sync.pending
            self._hidden = {name: state for name, state in self._hidden.items() if name in found}
            await self._read_aliases_and_pins()
            self._seen = sightings
            return not self._sync.pending

    async def mount(self, name: str, path: Path) -> None:
        """Serve a folder inside the adapter folders under a name of its own, from the next scan on.

        Nothing above the folder may be a link; the folder may be one, into the roots.
        """
        async with self._scanning:
            self._hidden.pop(name, None)
            self._mounted[name] = path
            self._handled.pop(name, None)

    def forget_pins(self) -> None:
        """Read the pins again at the next scan, even where their files are unchanged."""
        self._pins_state = None

    async def hide(self, name: str) -> None:
        """Serve a name no more, until its folder changes or it is mounted."""
        async with self._scanning:
            if self._mounted.pop(name, None) is not None:
                self._handled.pop(name, None)
            for own, path in await asyncio.to_thread(lambda: list(self._sub_folders())):
                if own == name and name not in self._hidden:
                    self._hidden[name] = await asyncio.to_thread(folder_state, path, self._roots)
            self._forget(name)

    def is_current(self, name: str) -> bool:
        """Whether what the last scan found of a name was applied: it is served, or refused."""
        return name in self._handled and name not in self._missing

    async def _wait(self, seconds: float) -> None:
        """Wait for events, ``seconds`` at most; meanwhile, scan the folders of pending names."""
        due = time.monotonic() + seconds
        while not self._has_events and (left := due - time.monotonic()) > 0:
            pause = min(left, self.settle / 2) if self._sync.pending else left
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._sync.wakeup.wait(), pause)
            self._sync.wakeup.clear()
            if self._sync.pending and not self._has_events:
                await self._scan_and_report(frozenset(self._sync.pending))
        if self._has_events:
            await asyncio.sleep(self.settle / 4)  # events come in groups
        self._has_events = False

    def is_inside(self, path: Path) -> bool:
        """Whether a folder, whose path had no links, is where that says, or where links may lead."""
        return path.resolve() == path or leads_inside(path, self._roots)

    def _log_failure(self, error: OSError) -> None:
        """Log once why scans fail, until one succeeds."""
        if self._logged_errno != error.errno:
            self._logged_errno = error.errno
            logger.warning(
                "the adapter folders cannot be scanned (%s: %s); adapters that were served stay",
                error.filename,
                error.strerror,
            )

    async def _scan_and_report(self, names: Collection[str] | None = None) -> bool:
        try:
            return await self.scan(names)
        except Exception:
            logger.exception("scanning the adapter folders failed; trying again")
            return False

    def _keep_listening(self) -> bool:
        """Watch the folders that exist now; True where the system sends events for all of them.

        Each folder is named by itself, because a recursive watch goes through links, wherever they lead. Another set
        of them, or another folder in the place of one, is taken up after a while that is longer the more there are:
        that takes 10 ms for a thousand.
        """
        folders = self.folders if self._store is None else (*self.folders, self._store.state_dir)
        there = [(folder, folder.stat().st_ino) for folder in folders if folder.is_dir()]
        if not there or there[0][0] != self.folders[0]:
            return False  # the folder does not exist yet: only a scan finds it
        wanted, now = frozenset([*there, *self._watchable]), time.monotonic()
        if wanted != self._watched and now >= self._listening_since + self.settle * (1 + len(wanted) // 200):
            if self._listening is not None:
                self._listening.cancel()
            self._watched, self._listening_since = wanted, now
            paths = [path for path, _ in wanted]
            self._listening = asyncio.create_task(self._listen(paths))
            self._has_events = True  # changes before the watch began are found by one more scan
        return wanted == self._watched and self._listening is not None and not self._listening.done()

    async def _listen(self, paths: Collection[Path]) -> None:
        """Bring the next scan forward at every event in the folders, while the system sends events."""
        try:
            async for _ in awatch(
                *paths, recursive=False, debounce=200, step=50, watch_filter=None, rust_timeout=5_000
            ):
                self._has_events = True
                self._sync.wakeup.set()
        except (OSError, RuntimeError) as error:
            logger.info("no file system events from the adapter folders (%s); scanning every %g s", error, self.settle)

    async def _apply(self, name: str, found: Found, now: float) -> bool:
        """Have a folder read that is new or changed. False where it has not settled."""
        if self._handled.get(name) == (found.path, found.state) or self._hidden.get(name) == found.state:
            return True
        if not self._has_settled(name, found, now):
            return False
        self._hidden.pop(name, None)
        if name in self._sync.registry:
            taken = await self._sync.update(name, found.path, found.state)
        else:
            taken = await self._sync.add(name, found.path, found.state)
        if taken:
            self._handled[name] = (found.path, found.state)
        return taken

    def _has_settled(self, name: str, found: Found, now: float) -> bool:
        seen, since = self._seen.get(name, (None, now))
        unchanged = seen == found and now - since >= self.settle
        return unchanged or self.settle <= time.time() - found.changed

    def _sighting(self, name: str, found: Found, now: float) -> tuple[Found, float]:
        """The folder, and since when it has been unchanged."""
        seen, since = self._seen.get(name, (None, now))
        return (found, since if seen == found else now)

    def _forget(self, name: str) -> None:
        self._handled.pop(name, None)
        self._missing.pop(name, None)
        self._mounted.pop(name, None)
        self._sync.remove(name)

    def _timed_read(self, names: Collection[str] | None) -> dict[str, Found]:
        """Read the folders; how long a full read takes bounds how often there is one.

        The shorter one of two in a row counts, so that a disk that stalls once delays nothing.
        """
        since = time.perf_counter()
        found = self._read_folders(names)
        seconds = time.perf_counter() - since
        if names is None:
            self._durations = (self._durations[1], seconds)
            links = any(follows_links(folder.state) for folder in found.values())
            self._linked = links or any(folder.is_symlink() for folder in self.folders)
            self._watchable = frozenset(
                (folder.path, folder.inode) for folder in found.values() if _can_be_watched(folder)
            )
        if seconds > _SLOW_SCAN:
            logger.warning("scanning %d adapter folders took %.1f s", len(found), seconds)
        return found

    def _read_folders(self, names: Collection[str] | None = None) -> dict[str, Found]:
        """Each adapter folder by name, with its files' names, inodes, sizes and times."""
        found: dict[str, Found] = {}
        mounted = [(name, path) for name, path in self._mounted.items() if names is None or name in names]
        for name, path in [*mounted, *self._sub_folders(names)]:
            if name not in found and (name not in self._mounted or self.is_inside(path)):
                with contextlib.suppress(OSError):
                    status = os.lstat(path)
                    state = folder_state(path, self._roots)
                    changed = max([status.st_ctime, *(entry[4] / 1e9 for entry in state)])
                    found[name] = Found(path, state, changed, _inode(path, status))
        return found

    def _sub_folders(self, names: Collection[str] | None = None) -> Iterator[tuple[str, Path]]:
        """The folders of some names, or of all that are there."""
        for folder in self.folders:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                yield from sub_folders(folder, names)

    async def read_aliases_again(self) -> None:
        """Read the aliases now, whether or not their file changed."""
        async with self._scanning:
            self._aliases_state = None
            await self._read_aliases_and_pins()

    async def _read_aliases_and_pins(self) -> None:
        """Read the aliases and the pins again where their files changed."""
        path = self.folders[0] / ALIASES_FILE
        state = await asyncio.to_thread(file_state, path, self._roots)
        if state != self._aliases_state:
            self._aliases_state = state
            try:
                data = await asyncio.to_thread(read_file, path, MAX_ALIASES_BYTES, self._roots) if state else None
                self._adapters.set_aliases(parse_aliases(data or b""))
            except (OSError, ValueError) as error:
                logger.error("%s is not used, the aliases before it stay: %s", ALIASES_FILE, error)
        if self._store is None:
            return
        pins = await asyncio.to_thread(self._store.pins_state)
        if pins != self._pins_state:
            self._pins_state = pins
            self._adapters.set_pins(await asyncio.to_thread(self._store.pins))


def _inode(path: Path, status: os.stat_result) -> int:
    """That of a folder, or of what a link leads to; the link's own where it leads nowhere."""
    if stat.S_ISLNK(status.st_mode):
        with contextlib.suppress(OSError):
            return os.stat(path).st_ino
    return status.st_ino


def _can_be_watched(found: Found) -> bool:
    """Whether the system may send events for a folder; for one that may not be read it does not, and scans find it."""
    effective = os.access in os.supports_effective_ids
    return not _is_outside(found.state) and os.access(found.path, os.R_OK, effective_ids=effective)


def _is_outside(state: FolderState) -> bool:
    """Whether a folder is a link that leads outside the roots, so that nothing behind it was read."""
    return [name for name, *_ in state] == [""]
