"""Applies changes of adapter folders to the registry: list, hash, update, remove."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Protocol

from server.adapters.adapter_cache import retrieve_exception
from server.adapters.content.folder import UNREAD_FILES, FolderState
from server.adapters.content.manifest import Listing, Manifest
from server.adapters.reader import AdapterReader, FolderMoved
from server.adapters.registry import Adapter, AdapterRegistry, Entry
from server.adapters.versions import DIGITS, Pin
from server.errors import AdapterRejected, first, one_line
from server.metrics import Metrics

logger = logging.getLogger("quickchange.adapters")


class SyncListener(Protocol):
    """Is told of changes of the registry, and keeps the weights in memory in step."""

    def swapping(self, entry: Entry, adapter: Adapter, manifest: Manifest) -> AbstractAsyncContextManager[None]:
        """A context around a change of a name's current version."""

    def added(self, entry: Entry) -> None: ...

    def removed(self, entry: Entry) -> None: ...

    def has_weights(self, entry: Entry) -> bool:
        """Whether the version that a name refers to can be served without its folder."""


class AdapterSync:
    """Applies the watcher's findings to the registry.

    ``refusals`` maps the name of each refused folder to its path and the reason. ``other_bases`` has the names of those
    that are intact, with the base that each is for. ``pending`` are names whose folders the watcher reads next;
    ``wakeup`` is set when one is added. At start, when there may be thousands, new adapters are logged as ``DEBUG``,
    and those for other bases in one line by ``end_start``.
    """

    def __init__(
        self, registry: AdapterRegistry, reader: AdapterReader, *, listener: SyncListener, metrics: Metrics
    ) -> None:
        self.registry, self.reader, self.metrics = registry, reader, metrics
        self.refusals: dict[str, tuple[Path, str]] = {}
        self.other_bases: dict[str, str] = {}
        self.pending: set[str] = set()
        self.wakeup = asyncio.Event()
        self._level = logging.DEBUG
        self._listener = listener
        self._reread_logged: set[str] = set()
        self._read_errors: dict[str, int | None] = {}
        self._hashing: dict[Entry, asyncio.Task[Adapter]] = {}
        self._unhashed: asyncio.Queue[Entry] = asyncio.Queue()

    def end_start(self) -> None:
        """Log what was found at start, and from now on each new adapter."""
        self._level = logging.INFO
        notes: dict[str, list[str]] = {}
        for entry in self.registry:
            if entry.listing.base_note is not None:
                notes.setdefault(entry.listing.base_note, []).append(entry.name)
        for note, names in notes.items():
            logger.info("adapters %s: %s", first(names), one_line(note))
        names_of: dict[str, list[str]] = {}
        for name, base in sorted(self.other_bases.items()):
            if name not in self.registry:
                names_of.setdefault(base, []).append(name)
        if names_of:
            number = sum(len(names) for names in names_of.values())
            folders = "folder is for another base" if number == 1 else "folders are for other bases"
            shown = "; ".join(f"{one_line(first(names))} ({base})" for base, names in names_of.items())
            logger.info("%d adapter %s and not served: %s", number, folders, shown)

    async def add(self, name: str, path: Path, state: FolderState) -> bool:
        """List a new folder by its headers. Its bytes are hashed later, or at the first request. False: try again."""
        try:
            listing = await self.reader.listing(path, name)
        except AdapterRejected as error:
            await self._fall_back(name, path, state, error)
            return True
        except FolderMoved as error:
            self._log_read_error(name, error)
            return False
        except Exception as error:
            logger.exception("reading adapter folder %s failed", one_line(name))
            self._refuse(name, path, f"reading the folder failed ({type(error).__name__})")
            return True
        self._settle(name)
        self._accept(name)
        entry = self.registry.add(listing, state)
        known = self.reader.known_digests(listing, state)
        if known is None:
            self._unhashed.put_nowait(entry)
        else:
            self.registry.publish(Adapter(listing, known.weights_digest, known.version_digest), state)
        self._report()
        self._listener.added(entry)
        logger.log(
            self._level,
            "adapter %s: %d modules, rank %d, base checked by %s%s",
            name,
            len(listing.plan.modules),
            listing.plan.rank,
            listing.base_check,
            "" if listing.base_note is None else f" ({one_line(listing.base_note)})",
        )
        _log_unread(listing)
        return True

    async def update(self, name: str, path: Path, state: FolderState) -> bool:
        """Read a changed folder, load the new version beside the old one if that is in memory, then switch the name.

        False: the folder changed again, or cannot be read now; try again.
        """
        entry = self.registry.get(name)
        if entry.current is None:
            return await self.add(name, path, state)
        try:
            manifest = await self.reader.manifest(path, state, name)
            await self._switch(entry, manifest, state)
            self._settle(name)
            _log_unread(manifest)
        except AdapterRejected as error:
            self._refuse_change(entry, path, error.reason, other_base=error.other_base)
        except FolderMoved as error:
            self._log_read_error(name, error)
            return False
        except Exception as error:
            logger.exception("reading adapter folder %s failed", one_line(name))
            self._refuse_change(entry, path, f"reading the folder failed ({type(error).__name__})")
        return True

    def request_read(self, name: str) -> None:
        """Ask the watcher to read a folder soon that a request found changed. Logged once until it was read."""
        if name in self.registry and name not in self._reread_logged:
            self._reread_logged.add(name)
            logger.info("adapter %s: the folder changed after it was read; reading the folder again", name)
        if name not in self.pending:
            self.pending.add(name)
            self.wakeup.set()

    def remove(self, name: str) -> None:
        self._settle(name)
        self._accept(name)
        if name in self.registry:
            self._withdraw(name)
            logger.info("adapter %s: removed", name)

    async def hash(self, entry: Entry) -> Adapter:
        """The version of a name that is only listed yet. Raises ``AdapterRejected`` or ``FolderMoved``."""
        if entry.current is not None:
            return entry.current
        if entry not in self._hashing:
            task = self._hashing[entry] = asyncio.ensure_future(self._hash(entry))
            task.add_done_callback(retrieve_exception)
        return await asyncio.shield(self._hashing[entry])

    async def hash_all(self) -> None:
        """Hash the folders that are only listed, one by one, until cancelled."""
        num_hashed, since = 0, time.perf_counter()
        while True:
            if self._unhashed.empty() and num_hashed:
                logger.info("%d adapters hashed in %.1f s", num_hashed, time.perf_counter() - since)
                await self._save_digests()
                num_hashed = 0
            entry = await self._unhashed.get()
            since = since if num_hashed else time.perf_counter()
            try:
                if self.registry.find(entry.name) is entry:
                    await self.hash(entry)
                    num_hashed += 1
            except (AdapterRejected, FolderMoved):
                continue  # it was logged, or the watcher reads the folder again
            except Exception:
                logger.exception("reading adapter folder %s failed", entry.name)

    async def _fall_back(self, name: str, path: Path, state: FolderState, error: AdapterRejected) -> None:
        """Refuse a folder; serve the pinned or else the newest kept version instead, if there is one."""
        pin = self.registry.pins.get(name, Pin())
        versions = await self.reader.find_kept(name, pin.version or "")
        kept = None
        if versions:
            with contextlib.suppress(AdapterRejected, FolderMoved):
                kept = await self.reader.kept(name, versions[-1])
        if kept is not None:
            self.registry.publish(Adapter.of(kept), state)
            self.registry.get(name).refused = error.reason
        self._refuse(name, path, error.reason, other_base=error.other_base)

    async def _hash(self, entry: Entry) -> Adapter:
        try:
            manifest = await self.reader.manifest(entry.listing.path, entry.state, entry.name)
        except AdapterRejected as error:
            self.refuse(entry, error.reason)
            raise
        finally:
            del self._hashing[entry]
        adapter = Adapter.of(manifest)
        await self._keep(manifest, entry.state)
        if self.registry.find(entry.name) is entry:
            self.registry.publish(adapter, entry.state)
        return adapter

    async def _switch(self, entry: Entry, manifest: Manifest, state: FolderState) -> None:
        adapter = Adapter.of(manifest)
        self._accept(entry.name)
        if entry.current is not None and entry.current.version_digest == adapter.version_digest:
            if entry.listing.path != manifest.path:
                entry.listing, entry.current = manifest.listing, adapter
            entry.state, entry.refused = state, None
            return
        await self._keep(manifest, state)
        async with self._listener.swapping(entry, adapter, manifest):
            self.registry.publish(adapter, state)
        plan = manifest.plan
        logger.info("adapter %s: new version, %d modules, rank %d", adapter.label, len(plan.modules), plan.rank)

    async def _save_digests(self) -> None:
        try:
            await self.reader.save_digests()
        except OSError as error:
            logger.error("writing the digest cache to the state directory failed: %s", error.strerror)

    async def _keep(self, manifest: Manifest, state: FolderState) -> None:
        try:
            await self.reader.keep(manifest, state)
        except OSError as error:
            logger.error(
                "writing version %s of adapter %s to the state directory failed: %s",
                manifest.version_digest[:DIGITS],
                manifest.name,
                error.strerror,
            )

    def refuse(self, entry: Entry, reason: str, *, other_base: str | None = None) -> None:
        """Remove a name whose only version was rejected when its bytes were read."""
        if self.registry.find(entry.name) is entry:
            self._withdraw(entry.name)
        self._refuse(entry.name, entry.listing.path, reason, other_base=other_base)

    def _withdraw(self, name: str) -> None:
        self._listener.removed(self.registry.withdraw(name))
        self._report()

    def _log_read_error(self, name: str, error: FolderMoved) -> None:
        """Log a temporary read error of a folder, once until it was read."""
        cause = error.__cause__
        if isinstance(cause, OSError) and self._read_errors.get(name) != cause.errno:
            self._read_errors[name] = cause.errno
            logger.warning(
                "adapter folder %s cannot be read just now: %s; trying again", one_line(name), cause.strerror
            )

    def _settle(self, name: str) -> None:
        """Log the next change and read error of a folder again."""
        self._reread_logged.discard(name)
        self._read_errors.pop(name, None)

    def _accept(self, name: str) -> None:
        self.refusals.pop(name, None)
        self.other_bases.pop(name, None)

    def _refuse_change(self, entry: Entry, path: Path, reason: str, *, other_base: str | None = None) -> None:
        """Refuse a folder's new content; the name stays if the version that it refers to can be served."""
        entry.refused = reason
        if not self._listener.has_weights(entry):
            self._withdraw(entry.name)
        self._refuse(entry.name, path, reason, other_base=other_base)

    def _refuse(self, name: str, path: Path, reason: str, *, other_base: str | None = None) -> None:
        self._settle(name)
        self._accept(name)
        entry = self.registry.find(name)
        if entry is not None and entry.current is None:
            self._withdraw(name)
        self.refusals[name] = (path, reason)
        kept = "; the previous version is still served" if name in self.registry else ""
        if other_base is None:
            self.metrics.adapter_rejections.inc()
            logger.warning("adapter folder %s is not served: %s%s", one_line(name), reason, kept)
            return
        self.other_bases[name] = other_base
        logger.log(
            logging.INFO if kept else self._level, "adapter folder %s is not served: %s%s", one_line(name), reason, kept
        )

    def _report(self) -> None:
        self.metrics.adapters_loaded.set(len(self.registry))


def _log_unread(listing: Listing) -> None:
    """Log the files that an adapter is served without."""
    for file, reason in listing.unread.items():
        logger.warning(
            "adapter %s is served without %s (%s): %s", listing.name, file, UNREAD_FILES[file], one_line(reason)
        )
