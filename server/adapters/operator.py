"""Operations on a running server's adapters: load, unload, delete, pin, roll back."""

from __future__ import annotations

import asyncio
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from server.adapters.adapter_library import AdapterLibrary
from server.adapters.names import is_name
from server.adapters.registry import Adapter
from server.adapters.versions import Pin, VersionStore
from server.adapters.watcher import AdapterWatcher
from server.errors import AdapterBusy, AdapterRejected, InvalidRequest, VersionMoved

SETTLE_TIMEOUT = 10.0
"""Seconds to wait for a folder that is being changed while it is loaded."""


MAX_OPERATIONS = 4
"""Loads and unloads at the same time; each may read a whole folder."""


class AdapterOperator:
    """Operates on folders inside ``watcher.folders``; pins are also written to the state directory, if there is one."""

    def __init__(self, adapters: AdapterLibrary, watcher: AdapterWatcher, store: VersionStore | None) -> None:
        self._adapters, self._watcher, self._store = adapters, watcher, store
        self._busy: set[str] = set()

    async def load(self, name: str, path: str, *, in_place: bool, expected: str | None = None) -> Adapter:
        """Serve a folder inside the adapter folders under a name, and load it.

        ``expected`` are the first digits of the version's digest. Raises ``InvalidRequest`` for a path outside them, or
        a name that is in use without ``in_place``; ``AdapterRejected`` for a folder that cannot be served;
        ``VersionMoved``, and serves what it served before, for another version; ``AdapterBusy``.
        """
        with self._busy_with(name):
            return await self._load(name, path, in_place=in_place, expected=expected)

    async def _load(self, name: str, path: str, *, in_place: bool, expected: str | None) -> Adapter:
        if not is_name(name):
            raise InvalidRequest(f"Invalid 'lora_name': {name!r:.80} is no model name.", param="lora_name")
        folder = await asyncio.to_thread(self._resolve, path)
        if name in self._adapters.registry and not in_place:
            raise InvalidRequest(
                f"The adapter '{name}' is loaded already: set 'load_inplace' to replace it.", param="lora_name"
            )
        entry = self._adapters.registry.find(name)
        before = None if entry is None else entry.listing.path  # the entry changes with the folder
        await self._watcher.mount(name, folder)
        await self._wait_until_read(name, folder)
        if (refusal := self._adapters.sync.refusals.get(name)) is not None:
            if name not in self._adapters.registry:
                await self._watcher.hide(name)
            raise AdapterRejected(name, refusal[1])
        if expected is not None:
            await self._check_version(name, expected, before=before)
        lease = await self._adapters.acquire(name)
        lease.release()
        return lease.adapters[0].adapter

    async def _check_version(self, name: str, expected: str, *, before: Path | None) -> None:
        """Serve the folder from before, if any, and raise ``VersionMoved`` if the new one has another version."""
        found = (await self._adapters.served(name)).version_digest
        if found.startswith(expected):
            return
        if before is None:
            await self._watcher.hide(name)
        else:
            await self._watcher.mount(name, before)
            await self._wait_until_read(name, before)
        raise VersionMoved(name, found=found)

    async def unload(self, name: str, *, expected: str | None = None) -> None:
        """Stop serving a name until its folder changes or it is loaded again.

        Raises ``ModelNotFound``; ``VersionMoved`` if the served version is not the expected one; ``AdapterBusy``.
        """
        with self._busy_with(name):
            self._adapters.registry.get(name)
            if expected is not None:
                found = (await self._adapters.served(name)).version_digest
                if not found.startswith(expected):
                    raise VersionMoved(name, found=found)
            await self._watcher.hide(name)

    @contextmanager
    def _busy_with(self, name: str) -> Iterator[None]:
        if name in self._busy or len(self._busy) >= MAX_OPERATIONS:
            raise AdapterBusy(name)
        self._busy.add(name)
        try:
            yield
        finally:
            self._busy.discard(name)

    async def delete(self, name: str) -> None:
        """Delete an adapter: folder, kept versions and pin. Raises ``ModelNotFound`` or ``InvalidRequest``."""
        entry = self._adapters.registry.get(name)
        path = entry.listing.path if entry.refused is None else self._watcher.folders[0] / name
        if path.name != name or path.parent.resolve() != self._watcher.folders[0].resolve():
            raise InvalidRequest(
                f"The folder of adapter '{name}' is not directly inside the adapter folder: unload it instead.",
                param="model",
            )
        try:
            await asyncio.to_thread(_remove, path)
        except OSError as error:
            raise InvalidRequest(
                f"The folder of adapter '{name}' cannot be deleted ({error.strerror}).", param="model"
            ) from error
        await self._watcher.hide(name)
        if self._store is not None:
            await asyncio.to_thread(self._store.forget, name)
        self._watcher.forget_pins()
        pins = self._adapters.registry.pins
        self._adapters.set_pins({pinned: pin for pinned, pin in pins.items() if pinned != name})

    async def pin(self, name: str, version: str | None) -> Adapter | None:
        """Pin a name to a version or, without one, in memory. Raises as ``AdapterLibrary.acquire``."""
        self._adapters.registry.get(name)
        before = self._adapters.registry.pins.get(name, Pin())
        if version is None:
            await self._set_pin(name, Pin(before.version, resident=True))
            return None
        lease = await self._adapters.acquire(f"{name}@{version}")
        lease.release()
        adapter = lease.adapters[0].adapter
        await self._set_pin(name, Pin(adapter.version_digest, before.resident))
        return adapter

    async def unpin(self, name: str) -> None:
        """Remove a name's pin: it follows its folder again, and idle weights may be evicted."""
        self._adapters.registry.get(name)
        await self._set_pin(name, Pin())

    async def rollback(self, name: str) -> Adapter:
        """Pin a name to the version before the served one. Raises ``ModelNotFound``, ``InvalidRequest``."""
        entry = self._adapters.registry.get(name)
        served = await self._adapters.served(name)
        kept = [] if self._store is None else await asyncio.to_thread(self._store.versions, name)
        digests = [version.digest for version in kept] or [version.version_digest for version in entry.versions]
        earlier = digests[: digests.index(served.version_digest)] if served.version_digest in digests else digests
        if not earlier:
            raise InvalidRequest(f"The adapter '{name}' has no version before {served.label}.", param="model")
        adapter = await self.pin(name, earlier[-1])
        assert adapter is not None
        return adapter

    async def _wait_until_read(self, name: str, folder: Path) -> None:
        """Wait until a mounted folder was read, and is served or refused. Raises ``InvalidRequest``."""
        deadline = time.monotonic() + max(SETTLE_TIMEOUT, 4 * self._watcher.settle)
        while True:
            await self._watcher.scan()
            if self._watcher.is_current(name):
                return
            gone = not await asyncio.to_thread(folder.is_dir)
            if gone or time.monotonic() > deadline:
                await self._watcher.hide(name)
                what = "does not exist" if gone else f"kept changing for {SETTLE_TIMEOUT:g} seconds"
                raise InvalidRequest(f"Invalid 'lora_path': the folder {what}.", param="lora_path")
            await asyncio.sleep(self._watcher.settle / 4)

    async def _set_pin(self, name: str, pin: Pin) -> None:
        if self._store is not None:
            await asyncio.to_thread(self._store.set_pin, name, pin)
            self._watcher.forget_pins()
        self._adapters.set_pins({**self._adapters.registry.pins, name: pin})

    def _resolve(self, text: str) -> Path:
        """The folder at a path inside the adapter folders, none of whose parts begins with a dot.

        No part above the folder may be a link. The folder itself may be a link into the roots.
        """
        given = Path(text)
        for root in self._watcher.folders:
            path = given if given.is_absolute() else root / given
            if not (path.is_relative_to(root) or path.is_relative_to(root.absolute())):
                continue
            parts = path.absolute().relative_to(root.absolute()).parts
            if "\0" in text or not parts or not all(is_name(part) for part in parts):
                continue
            folder = root.resolve().joinpath(*parts)
            parent_has_no_link = folder.parent.resolve() == folder.parent
            if folder.is_dir() and parent_has_no_link and self._watcher.is_inside(folder):
                return folder
        raise InvalidRequest(
            "Invalid 'lora_path': it must be a folder inside the server's adapter folder.", param="lora_path"
        )


def _remove(path: Path) -> None:
    """Rename a folder to a hidden name, which removes the adapter at once, then delete it."""
    aside = path.with_name(f".deleted-{uuid.uuid4().hex}")
    os.rename(path, aside)
    if aside.is_symlink():
        aside.unlink()
    else:
        shutil.rmtree(aside)
