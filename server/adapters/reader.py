"""Reads adapter folders in a thread of its own.

It is as urgent as the engine's: one of lower priority would be put aside while it keeps the interpreter.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from server.adapters.content.folder import FolderState, folder_state, sizes_of
from server.adapters.content.generation_defaults import GenerationDefaults
from server.adapters.content.manifest import AdapterPolicy, Listing, Manifest, list_folder, read_manifest
from server.adapters.content.signature import BaseSignature
from server.adapters.versions import CachedDigest, VersionStore
from server.errors import AdapterRejected

T = TypeVar("T")


class FolderMoved(Exception):
    """What the folder holds is still to be judged: it changed since it had settled, or cannot be read just now."""


class AdapterReader:
    """Folders and kept versions as manifests. ``check_defaults`` raises ``ValueError`` for an unsupported value."""

    def __init__(
        self,
        base: BaseSignature,
        policy: AdapterPolicy,
        *,
        store: VersionStore | None = None,
        check_defaults: Callable[[GenerationDefaults], None] = lambda defaults: None,
    ) -> None:
        self.store = store
        self.roots = policy.roots
        self._base, self._policy, self._check_defaults = base, policy, check_defaults
        self._digests: dict[str, CachedDigest] = {}
        self._unsaved = 0
        self._others: dict[Path, FolderState] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="adapters")

    async def run(self, function: Callable[..., T], *arguments: object) -> T:
        """Run something in the reader's thread, behind what it has to do already."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    async def listing(self, path: Path, name: str) -> Listing:
        """A folder's headers. Raises ``AdapterRejected``, or ``FolderMoved`` where they cannot be read just now."""
        return await self.run(self._list_settled, path, name)

    async def manifest(self, path: Path, state: FolderState, name: str) -> Manifest:
        """The whole folder, if it is as it was when it had settled. Raises ``FolderMoved`` or ``AdapterRejected``."""
        return await self.run(self._read_settled, path, state, name)

    async def unchanged(self, path: Path, name: str, version_digest: str, state: FolderState) -> Manifest | None:
        """A version from its folder, whose times moved since ``state``; None where it holds something else.

        A hard link, ``touch``, ``chmod`` or a checkout moves times; the digest tells that nothing else changed.
        """
        return await self.run(self._read_unchanged, path, name, version_digest, state)

    async def kept(self, name: str, version_digest: str) -> Manifest | None:
        """A version of a name from the state directory; None where it is not there, or no longer what it was."""
        return await self.run(self._read_kept, name, version_digest)

    async def keep(self, manifest: Manifest, state: FolderState) -> None:
        """Put a version into the state directory, where there is one, and note the digests of its folder."""
        if self.store is None:
            return
        await self.run(self.store.put, manifest.name, manifest.version_digest, manifest.files.by_name())
        cached = CachedDigest(state, manifest.weights_digest, manifest.version_digest)
        self._digests[str(manifest.path)] = cached
        self._unsaved += 1

    def known_digests(self, listing: Listing, state: FolderState) -> CachedDigest | None:
        """The digests of a folder that was hashed when it looked the same, if that version is kept."""
        if self.store is None:
            return None
        cached = self._digests.get(str(listing.path))
        if cached is None or cached.state != state or self.store.folder(cached.version_digest) is None:
            return None
        return cached

    async def load_digests(self) -> None:
        if self.store is not None:
            self._digests = await self.run(self.store.load_digests)

    async def save_digests(self) -> None:
        if self.store is not None and self._unsaved:
            self._unsaved = 0
            there = {path: cached for path, cached in self._digests.items() if Path(path).is_dir()}
            await self.run(self.store.save_digests, there)

    async def find_kept(self, name: str, prefix: str) -> list[str]:
        """Digests of kept versions of a name that begin so."""
        if self.store is None:
            return []
        versions = await self.run(self.store.versions, name)
        return [version.digest for version in versions if version.digest.startswith(prefix)]

    def has_kept(self, version_digest: str) -> bool:
        return self.store is not None and self.store.folder(version_digest) is not None

    def close(self) -> None:
        """End the thread when it has done what it is at."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _list_settled(self, path: Path, name: str) -> Listing:
        before = folder_state(path, self.roots)
        try:
            return list_folder(path, self._base, self._policy, name=name)
        except OSError as error:
            raise FolderMoved(name) from error
        except AdapterRejected:
            if folder_state(path, self.roots) != before:
                raise FolderMoved(name) from None
            raise

    def _read_settled(self, path: Path, state: FolderState, name: str) -> Manifest:
        if folder_state(path, self.roots) != state:
            raise FolderMoved(name)
        try:
            manifest = self._read(path, name)
        except OSError as error:
            raise FolderMoved(name) from error
        except AdapterRejected:
            if folder_state(path, self.roots) != state:
                raise FolderMoved(name) from None
            raise
        if folder_state(path, self.roots) != state:
            raise FolderMoved(name)
        return manifest

    def _read_unchanged(self, path: Path, name: str, version_digest: str, state: FolderState) -> Manifest | None:
        now = folder_state(path, self.roots)
        if sizes_of(now) != sizes_of(state) or self._others.get(path) == now:
            return None
        try:
            manifest = self._read(path, name)
        except (OSError, AdapterRejected):
            return None
        if manifest.version_digest == version_digest:
            self._others.pop(path, None)
            return manifest
        self._others[path] = now  # not read again for every request that asks
        return None

    def _read_kept(self, name: str, version_digest: str) -> Manifest | None:
        folder = None if self.store is None else self.store.folder(version_digest)
        if folder is None:
            return None
        try:
            manifest = self._read(folder, name)
        except OSError as error:
            raise FolderMoved(name) from error
        return manifest if manifest.version_digest == version_digest else None

    def _read(self, path: Path, name: str) -> Manifest:
        manifest = read_manifest(path, self._base, self._policy, name=name)
        try:
            self._check_defaults(manifest.defaults)
        except ValueError as error:
            raise AdapterRejected(name, str(error)) from None
        return manifest
