"""Looks at the adapter folders and keeps the registry like them: what appears is served, what goes is gone.

A folder is read when two looks in a row found it the same, so that one still being copied is left alone; at start every
folder is read at once. A folder that is refused is reported once, and read again when it changes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from server.adapters.manifest import BaseSignature, Limits, Manifest, read_manifest
from server.adapters.registry import Adapter, AdapterRegistry
from server.errors import AdapterRejected
from server.metrics import Metrics

logger = logging.getLogger("quickchange.adapters")

Signature = tuple[tuple[str, int, int, int], ...]


class AdapterWatcher:
    """Watches ``folders``, the first of which wins where two hold the same name; the first need not exist yet.

    ``load`` puts an adapter's weights into the engine and raises ``AdapterRejected`` where they cannot be served.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        registry: AdapterRegistry,
        load: Callable[[Manifest], Awaitable[None]],
        *,
        base: BaseSignature,
        limits: Limits,
        metrics: Metrics,
    ) -> None:
        self.folders, self.registry, self.metrics = tuple(folders), registry, metrics
        self._load, self._base, self._limits = load, base, limits
        self._seen: dict[Path, Signature] = {}
        self._handled: dict[Path, Signature] = {}
        self._rejected: dict[Path, str] = {}

    @property
    def rejected(self) -> dict[Path, str]:
        """Folders that are not served, and why."""
        return dict(self._rejected)

    async def run(self, interval: float) -> None:
        """Look every ``interval`` seconds until cancelled."""
        while True:
            await asyncio.sleep(interval)
            try:
                await self.scan()
            except Exception:
                logger.exception("looking at the adapter folders failed; trying again")

    async def scan(self, *, settled_only: bool = True) -> None:
        """One look: withdraw what is gone, read what is new or changed."""
        try:
            found = await asyncio.to_thread(self._look)
        except OSError as error:
            logger.warning("the adapter folders cannot be looked at (%s); what was served stays", error.strerror)
            return
        for path, signature in found.items():
            settled = self._seen.get(path) == signature or not settled_only
            if settled and self._handled.get(path) != signature:
                self._handled[path] = signature
                await self._read(path)
        names = {path.name for path in found}
        for path in [path for path in self._handled if path not in found]:
            if self._current(path) is None or path.name not in names:  # else a successor is still to be read
                self._forget(path)
        self._seen = found
        self.metrics.adapters_loaded.set(len(self.registry.list()))

    def _look(self) -> dict[Path, Signature]:
        """Each adapter folder with the names, inodes, sizes and times of its files."""
        found: dict[Path, Signature] = {}
        names: set[str] = set()
        for folder in self.folders:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                for entry in sorted(os.scandir(folder), key=lambda one: one.name):
                    if entry.name.startswith(".") or entry.name in names or not entry.is_dir(follow_symlinks=False):
                        continue
                    names.add(entry.name)
                    found[folder / entry.name] = _signature(entry.path)
        return found

    async def _read(self, path: Path) -> None:
        try:
            manifest = await asyncio.to_thread(read_manifest, path, self._base, self._limits)
            adapter = Adapter.of(manifest)
            if self._current(path) != adapter.version_digest:
                await self._publish(adapter, manifest)
            self._rejected.pop(path, None)
        except AdapterRejected as error:
            self._reject(path, error)
        except Exception as error:
            logger.exception("adapter folder %s could not be loaded", path.name)
            self._reject(path, AdapterRejected(path.name, f"it could not be loaded ({type(error).__name__})"))

    async def _publish(self, adapter: Adapter, manifest: Manifest) -> None:
        """Load and name a version; its weights are held meanwhile, in case a version of equal bytes is let go."""
        with self.registry.holding(adapter):
            await self._load(manifest)
            self.metrics.know_adapter(adapter.name)
            self.registry.publish(adapter)
        logger.info(
            "adapter %s@%s is served: rank %d, %d modules, %d bytes",
            adapter.name, adapter.version_digest[:12], adapter.rank, adapter.num_modules, adapter.num_bytes,
        )  # fmt: skip

    def _current(self, path: Path) -> str | None:
        """The version served from this folder."""
        return next((one.version_digest for one in self.registry.list() if one.path == path), None)

    def _reject(self, path: Path, error: AdapterRejected) -> None:
        """Report a folder that is not served; the version read from it before, if any, stays."""
        self._rejected[path] = error.reason
        self.metrics.adapter_rejections.inc()
        kept = "; the version read before is still served" if self._current(path) else ""
        logger.warning("adapter folder %s is not served: %s%s", path.name, error.reason, kept)

    def _forget(self, path: Path) -> None:
        """Take a name away with its folder, unless another folder has taken it over."""
        del self._handled[path]
        self._rejected.pop(path, None)
        if self._current(path) is not None:
            self.registry.withdraw(path.name)
            self.metrics.forget_adapter(path.name)
            logger.info("adapter %s is gone", path.name)


def _signature(folder: str) -> Signature:
    files = []
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                status = entry.stat(follow_symlinks=False)
                files.append((entry.name, status.st_ino, status.st_size, status.st_mtime_ns))
    return tuple(sorted(files))
