"""What an operator does to a running server's adapters: load, unload, delete, pin, roll back."""

from __future__ import annotations

import asyncio
import os
import shutil
import time
import uuid
from pathlib import Path

from server.adapters.library import AdapterLibrary
from server.adapters.names import is_name
from server.adapters.registry import Adapter
from server.adapters.versions import Pin, VersionStore
from server.adapters.watcher import AdapterWatcher
from server.errors import AdapterRejected, InvalidRequest

SETTLE_TIMEOUT = 10.0
"""Seconds that a folder which is to be served may go on changing."""


class AdapterOperator:
    """Acts on names and folders inside ``watcher.folders``; pins go to the state directory where there is one."""

    def __init__(self, adapters: AdapterLibrary, watcher: AdapterWatcher, store: VersionStore | None) -> None:
        self._adapters, self._watcher, self._store = adapters, watcher, store

    async def load(self, name: str, path: str, *, in_place: bool) -> Adapter:
        """Serve a folder inside the adapter folders under a name, and have it in memory.

        Raises ``InvalidRequest`` for a path outside them and for a name that is taken, unless ``in_place``;
        ``AdapterRejected`` for a folder that is not served.
        """
        if not is_name(name):
            raise InvalidRequest(f"Invalid 'lora_name': {name!r:.80} is no model name.", param="lora_name")
        folder = await asyncio.to_thread(self._inside, path)
        if name in self._adapters.registry and not in_place:
            raise InvalidRequest(
                f"The adapter '{name}' is loaded already: set 'load_inplace' to replace it.", param="lora_name"
            )
        await self._watcher.mount(name, folder)
        await self._settled(name, folder)
        if (refusal := self._adapters.sync.refusals.get(name)) is not None:
            if name not in self._adapters.registry:
                await self._watcher.hide(name)
            raise AdapterRejected(name, refusal[1])
        lease = await self._adapters.acquire(name)
        lease.release()
        return lease.adapters[0].adapter

    async def unload(self, name: str) -> None:
        """Serve a name no more until its folder changes, or it is loaded again. Raises ``ModelNotFound``."""
        self._adapters.registry.get(name)
        await self._watcher.hide(name)

    async def delete(self, name: str) -> None:
        """Delete an adapter: folder, kept versions and pin. Raises ``ModelNotFound`` or ``InvalidRequest``."""
        entry = self._adapters.registry.get(name)
        path = entry.listing.path if entry.refused is None else self._watcher.folders[0] / name
        if path.name != name or path.parent.resolve() != self._watcher.folders[0].resolve():
            raise InvalidRequest(
                f"The adapter '{name}' has no folder of its own right inside the adapter folder: unload it.",
                param="model",
            )
        try:
            await asyncio.to_thread(_remove, path)
        except OSError as error:
            raise InvalidRequest(
                f"The folder of '{name}' cannot be deleted ({error.strerror}).", param="model"
            ) from error
        await self._watcher.hide(name)
        if self._store is not None:
            await asyncio.to_thread(self._store.forget, name)
        self._watcher.forget_pins()
        pins = self._adapters.registry.pins
        self._adapters.set_pins({one: pin for one, pin in pins.items() if one != name})

    async def pin(self, name: str, version: str | None) -> Adapter | None:
        """Hold a name at a version, or keep it in memory where none is given. Raises as ``AdapterLibrary.acquire``."""
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
        """Let a name follow its folder again, and leave memory when it is not used."""
        self._adapters.registry.get(name)
        await self._set_pin(name, Pin())

    async def rollback(self, name: str) -> Adapter:
        """Hold a name at the version before the one it serves. Raises ``ModelNotFound``, ``InvalidRequest``."""
        entry = self._adapters.registry.get(name)
        served = await self._adapters.served(name)
        kept = [] if self._store is None else await asyncio.to_thread(self._store.versions, name)
        digests = [one.digest for one in kept] or [one.version_digest for one in entry.versions]
        earlier = digests[: digests.index(served.version_digest)] if served.version_digest in digests else digests
        if not earlier:
            raise InvalidRequest(f"There is no version of '{name}' before {served.label}.", param="model")
        adapter = await self.pin(name, earlier[-1])
        assert adapter is not None
        return adapter

    async def _settled(self, name: str, folder: Path) -> None:
        """Wait until a mounted folder was taken in, for better or worse. Raises ``InvalidRequest``."""
        deadline = time.monotonic() + max(SETTLE_TIMEOUT, 4 * self._watcher.settle)
        while True:
            await self._watcher.scan()
            if self._watcher.is_current(name):
                return
            gone = not await asyncio.to_thread(folder.is_dir)
            if gone or time.monotonic() > deadline:
                await self._watcher.hide(name)
                what = "is gone" if gone else f"went on changing for {SETTLE_TIMEOUT:g} seconds"
                raise InvalidRequest(f"Invalid 'lora_path': the folder {what}.", param="lora_path")
            await asyncio.sleep(self._watcher.settle / 4)

    async def _set_pin(self, name: str, pin: Pin) -> None:
        if self._store is not None:
            await asyncio.to_thread(self._store.set_pin, name, pin)
            self._watcher.forget_pins()
        self._adapters.set_pins({**self._adapters.registry.pins, name: pin})

    def _inside(self, text: str) -> Path:
        """A folder inside the adapter folders, none of whose parts begins with a dot.

        No part above it may be a link; the folder itself may be one, into the roots.
        """
        given = Path(text)
        for root in self._watcher.folders:
            path = given if given.is_absolute() else root / given
            inside = path.is_relative_to(root) or path.is_relative_to(root.absolute())
            parts = path.absolute().relative_to(root.absolute()).parts if inside else ()
            plain = "\0" not in text and parts and all(is_name(part) for part in parts)
            place = root.resolve().joinpath(*parts)
            if plain and place.is_dir() and place.parent.resolve() == place.parent and self._watcher.is_inside(place):
                return place
        raise InvalidRequest(
            "Invalid 'lora_path': it must be a folder inside the server's adapter folder.", param="lora_path"
        )


def _remove(path: Path) -> None:
    """Take a folder away in one step, then delete it."""
    aside = path.with_name(f".deleted-{uuid.uuid4().hex}")
    os.rename(path, aside)
    if aside.is_symlink():
        aside.unlink()
    else:
        shutil.rmtree(aside)
