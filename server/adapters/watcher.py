"""Looks at the adapter folders and tells the intake what appeared, changed and went.

A folder counts when nothing in it has changed for ``settle`` seconds, so that one still being copied is left alone; a
name is gone when its folder has been missing for ``grace`` seconds, so that one removed and put back is an update.
Events of the file system bring a look forward; where there are none, looks are taken every ``settle`` seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import stat
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from watchfiles import awatch

from server.adapters.aliases import ALIASES_FILE, MAX_ALIASES_BYTES, Alias, parse_aliases
from server.adapters.content.folder import Signature, read_file, signature_of
from server.adapters.intake import Intake
from server.adapters.versions import Pin, VersionStore

logger = logging.getLogger("quickchange.adapters")

_MOST_OF_THE_TIME = 20
"""Looks may take one part in so many of the time, however many folders there are."""
_SLOW_LOOK = 5.0
"""Seconds of a look that are worth a warning."""


@dataclass(frozen=True)
class Found:
    """A folder as it was found; ``changed`` is when anything in it last did, in seconds since the epoch."""

    path: Path
    signature: Signature
    changed: float


class AdapterWatcher:
    """Watches ``folders``, the first of which wins where two hold the same name; the first need not exist yet.

    ``on_aliases`` and ``on_pins`` are told when those change, on disk or by hand.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        intake: Intake,
        *,
        settle: float,
        grace: float,
        store: VersionStore | None = None,
        on_aliases: Callable[[Mapping[str, Alias]], None] = lambda aliases: None,
        on_pins: Callable[[Mapping[str, Pin]], None] = lambda pins: None,
    ) -> None:
        self.folders, self.intake, self.settle, self.grace = tuple(folders), intake, settle, grace
        self._store, self._on_aliases, self._on_pins = store, on_aliases, on_pins
        self._seen: dict[str, tuple[Found, float]] = {}
        self._handled: dict[str, tuple[Path, Signature]] = {}
        self._missing: dict[str, float] = {}
        self._hidden: dict[str, Signature] = {}
        self._mounted: dict[str, Path] = {}
        self._aliases_signature: Signature | None = None
        self._pins_signature: object = None
        self._pending: set[str] = set()
        self._durations = (0.0, 0.0)
        self._stirred = False
        self._woken = asyncio.Event()
        self._scanning = asyncio.Lock()
        intake.wanted = self.look_soon

    async def start(self) -> None:
        """Take in what is there. A folder that is just being copied gets a moment to settle."""
        await self.intake.reader.load_digests()
        deadline = time.monotonic() + 2 * self.settle
        while not await self.scan() and time.monotonic() < deadline:
            await asyncio.sleep(self.settle / 4)

    async def run(self) -> None:
        """Look again and again, until cancelled."""
        listening = asyncio.create_task(self._listen())
        try:
            while True:
                settled = await self._scan_and_report()
                pause = self.settle if listening.done() or not settled else 10 * self.settle
                await self._rest(max(pause, _MOST_OF_THE_TIME * min(self._durations)))
        finally:
            listening.cancel()

    async def scan(self, names: Collection[str] | None = None) -> bool:
        """One look, at all folders or at those of some names. True where every folder had settled."""
        async with self._scanning:
            now = time.monotonic()
            try:
                found = await asyncio.to_thread(self._timed_look, names)
            except OSError as error:
                logger.warning("the adapter folders cannot be looked at (%s); what was served stays", error.strerror)
                return False
            waiting = {name for name, one in found.items() if not await self._take(name, one, now)}
            gone = {name for name in self._handled if name not in found and (names is None or name in names)}
            for name in gone:
                if now - self._missing.setdefault(name, now) >= self.grace:
                    self._forget(name)
            self._missing = {name: since for name, since in self._missing.items() if name not in found}
            sightings = {name: self._sighting(name, one, now) for name, one in found.items()}
            self._pending = waiting | self._missing.keys()
            if names is not None:
                self._seen |= sightings
                return not self._pending
            self._hidden = {name: signature for name, signature in self._hidden.items() if name in found}
            await self._look_at_small_files()
            self._seen = sightings
            return not self._pending

    def look_soon(self, name: str) -> None:
        """Look at the folder of a name again, without waiting for the next look at all of them."""
        if name not in self._pending:
            self._pending.add(name)
            self._woken.set()

    async def mount(self, name: str, path: Path) -> None:
        """Serve a folder inside the adapter folders under a name of its own, from the next look on."""
        async with self._scanning:
            self._hidden.pop(name, None)
            self._mounted[name] = path.resolve()
            self._handled.pop(name, None)

    def forget_pins(self) -> None:
        """Read the pins again at the next look, whatever their files look like."""
        self._pins_signature = None

    async def hide(self, name: str) -> None:
        """Serve a name no more, until its folder changes or it is mounted."""
        async with self._scanning:
            if self._mounted.pop(name, None) is not None:
                self._handled.pop(name, None)
            for own, path in await asyncio.to_thread(lambda: list(self._sub_folders())):
                if own == name and name not in self._hidden:
                    self._hidden[name] = await asyncio.to_thread(signature_of, path)
            self._forget(name)

    def is_current(self, name: str) -> bool:
        """Whether what the last look found of a name was taken in, for better or worse."""
        return name in self._handled and name not in self._missing

    async def _rest(self, seconds: float) -> None:
        """Until events or ``seconds`` call for the next look at everything, look at what is pending."""
        due = time.monotonic() + seconds
        while not self._stirred and (left := due - time.monotonic()) > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._woken.wait(), min(left, self.settle / 2) if self._pending else left)
            self._woken.clear()
            if self._pending and not self._stirred:
                await self._scan_and_report(frozenset(self._pending))
        if self._stirred:
            await asyncio.sleep(self.settle / 4)  # a stir is seldom alone
        self._stirred = False

    async def _scan_and_report(self, names: Collection[str] | None = None) -> bool:
        try:
            return await self.scan(names)
        except Exception:
            logger.exception("looking at the adapter folders failed; trying again")
            return False

    async def _listen(self) -> None:
        """Bring the next look forward at every event in the folders, as long as the system tells of them."""
        paths = [folder for folder in self.folders if folder.is_dir()]
        if self._store is not None:
            paths.append(self._store.state_dir)
        if not paths or paths[0] != self.folders[0]:
            return  # the folder is still to be made: only looking finds it
        try:
            async for _ in awatch(*paths, debounce=200, step=50, watch_filter=None, rust_timeout=5_000):
                self._stirred = True
                self._woken.set()
        except (OSError, RuntimeError) as error:
            logger.info("no events from the adapter folders (%s); looking every %g s", error, self.settle)

    async def _take(self, name: str, found: Found, now: float) -> bool:
        """Tell the intake of a folder that is new or changed. False where it has not settled."""
        if self._handled.get(name) == (found.path, found.signature) or self._hidden.get(name) == found.signature:
            return True
        if not self._has_settled(name, found, now):
            return False
        self._hidden.pop(name, None)
        if name in self.intake.registry:
            taken = await self.intake.change(name, found.path, found.signature)
        else:
            taken = await self.intake.appear(name, found.path, found.signature)
        if taken:
            self._handled[name] = (found.path, found.signature)
        return taken

    def _has_settled(self, name: str, found: Found, now: float) -> bool:
        seen, since = self._seen.get(name, (None, now))
        unchanged = seen == found and now - since >= self.settle
        return unchanged or self.settle <= time.time() - found.changed

    def _sighting(self, name: str, found: Found, now: float) -> tuple[Found, float]:
        """The folder, and since when it has looked like this."""
        seen, since = self._seen.get(name, (None, now))
        return (found, since if seen == found else now)

    def _forget(self, name: str) -> None:
        self._handled.pop(name, None)
        self._missing.pop(name, None)
        self._mounted.pop(name, None)
        self.intake.vanish(name)

    def _timed_look(self, names: Collection[str] | None) -> dict[str, Found]:
        """A look whose length, if it is one at everything, bounds how often such looks are taken.

        The shorter one of two in a row counts, so that a disk that stalls once delays nothing.
        """
        since = time.perf_counter()
        found = self._look(names)
        seconds = time.perf_counter() - since
        if names is None:
            self._durations = (self._durations[1], seconds)
        if seconds > _SLOW_LOOK:
            logger.warning("looking at %d adapter folders took %.1f s", len(found), seconds)
        return found

    def _look(self, names: Collection[str] | None = None) -> dict[str, Found]:
        """Each adapter folder by name, with its files' names, inodes, sizes and times."""
        found: dict[str, Found] = {}
        mounted = [(name, path) for name, path in self._mounted.items() if names is None or name in names]
        for name, path in [*mounted, *self._sub_folders(names)]:
            if name not in found and (name not in self._mounted or path.resolve() == path):
                with contextlib.suppress(OSError):
                    changed = os.stat(path, follow_symlinks=False).st_ctime
                    signature = signature_of(path)
                    found[name] = Found(path, signature, max([changed, *(one[4] / 1e9 for one in signature)]))
        return found

    def _sub_folders(self, names: Collection[str] | None = None) -> Iterator[tuple[str, Path]]:
        """The folders of some names, or of all that are there."""
        for folder in self.folders:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                for name in sorted(os.listdir(folder) if names is None else names):
                    if not name.startswith(".") and _is_folder(folder / name):
                        yield name, folder / name

    async def _look_at_small_files(self) -> None:
        """Read the aliases and the pins again where they changed."""
        path = self.folders[0] / ALIASES_FILE
        signature = await asyncio.to_thread(_file_signature, path)
        if signature != self._aliases_signature:
            self._aliases_signature = signature
            try:
                data = await asyncio.to_thread(read_file, path, MAX_ALIASES_BYTES) if signature else None
                self._on_aliases(parse_aliases(data or b""))
            except (OSError, ValueError) as error:
                logger.error("%s is not used, the aliases before it stay: %s", ALIASES_FILE, error)
        if self._store is None:
            return
        pins = await asyncio.to_thread(self._store.pins_signature)
        if pins != self._pins_signature:
            self._pins_signature = pins
            self._on_pins(await asyncio.to_thread(self._store.pins))


def _is_folder(path: Path) -> bool:
    """Whether a folder, and no link to one, is there. Raises ``OSError`` where that cannot be told."""
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except FileNotFoundError:
        return False


def _file_signature(path: Path) -> Signature:
    return tuple(one for one in signature_of(path.parent) if one[0] == path.name)
