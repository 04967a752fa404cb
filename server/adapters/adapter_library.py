"""Leases the adapters that a request's ``model`` names: looks up names and versions, loads weights."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager

from server.adapters.adapter_cache import AdapterCache, Lease, LeasedAdapter, Loaded
from server.adapters.aliases import Alias
from server.adapters.compositions import check_composition, scaled
from server.adapters.content.manifest import Manifest
from server.adapters.model_names import MayUse, ModelNames, anything
from server.adapters.names import ModelRef
from server.adapters.reader import AdapterReader, FolderMoved
from server.adapters.registry import Adapter, AdapterRegistry, Entry
from server.adapters.sync import AdapterSync
from server.adapters.versions import DIGITS, Pin
from server.errors import (
    AdapterNotLoaded,
    AdapterPending,
    AdapterRejected,
    InvalidRequest,
    ModelNotFound,
    QueueFull,
    QuickchangeError,
)
from server.metrics import Metrics

logger = logging.getLogger("quickchange.adapters")

READ_TIMEOUT = 3.0
"""Seconds that a request waits for a changed folder to be read, before ``AdapterPending``."""
_RETRY_SECONDS = 0.1

LoadWeights = Callable[[Manifest], Awaitable[Loaded]]
"""Loads a version's weights into the engine. Raises ``AdapterRejected`` or ``AdapterNotLoaded``."""


class AdapterLibrary:
    """Leases adapters. ``load`` loads weights into the engine."""

    def __init__(
        self,
        registry: AdapterRegistry,
        cache: AdapterCache,
        reader: AdapterReader,
        load: LoadWeights,
        *,
        base_names: Sequence[str],
        metrics: Metrics,
    ) -> None:
        self.registry, self.cache, self.reader, self.metrics = registry, cache, reader, metrics
        self.sync = AdapterSync(registry, reader, listener=self, metrics=metrics)
        self.names = ModelNames(registry, base_names)
        self._load_weights = load
        self._preloading: dict[str, asyncio.Task[None]] = {}
        self._loaded: dict[str, Loaded] = {}
        self._in_use: Counter[str] = Counter()
        self._max_loads = asyncio.Semaphore(2)  # each holds a whole file in memory, outside the budget

    def resolve(
        self, model: str, *, user: str | None = None, scale: float | None = None, may_use: MayUse = anything
    ) -> tuple[ModelRef, ...]:
        """The adapters that ``model`` names, none for the base. Raises ``ModelNotFound``, ``InvalidRequest``."""
        try:
            return scaled(self.names.resolve(model, user=user, may_use=may_use).refs, scale)
        except ModelNotFound:
            raise self.not_found(model, may_use) from None

    async def acquire(self, model: str, *, user: str | None = None, scale: float | None = None) -> Lease:
        """Lease the adapters that ``model`` names. Raises as ``resolve`` and ``lease``, and for the base."""
        refs = self.resolve(model, user=user, scale=scale)
        if not refs:
            raise InvalidRequest(f"Invalid 'model': {model!r:.80} is the base, not an adapter.", param="model")
        return await self.lease(refs)

    async def lease(self, refs: tuple[ModelRef, ...], may_use: MayUse = anything) -> Lease:
        """Lease adapters, loaded in memory.

        Raises ``ModelNotFound``, ``InvalidRequest`` for an invalid composition, ``QueueFull``, and ``AdapterPending``
        if a changed folder was not read again in time.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + READ_TIMEOUT
        while True:
            try:
                return await self._lease(refs, may_use)
            except ModelNotFound as error:
                raise self.not_found(error.model, may_use) from None
            except FolderMoved as error:
                name = str(error)
                self.sync.request_read(name)
                if any(ref.name == name for ref in refs) and self._is_gone(name, refs):
                    raise self.not_found(name, may_use) from None
                if loop.time() > deadline:
                    raise AdapterPending(name) from None
            except AdapterRejected as error:
                if loop.time() > deadline or any(ref.name == error.adapter for ref in refs):
                    raise ModelNotFound(error.adapter, refused=error.reason) from error
            await asyncio.sleep(_RETRY_SECONDS)

    async def find(self, refs: tuple[ModelRef, ...], may_use: MayUse = anything) -> list[Adapter]:
        """The versions of adapters, not loaded. Raises ``ModelNotFound``, ``AdapterPending``, ``InvalidRequest``."""
        name = refs[0].name
        try:
            found = []
            for ref in refs:
                name = ref.name
                found.append(await self._usable(ref, may_use))
            return found
        except ModelNotFound as error:
            raise self.not_found(error.model, may_use) from None
        except FolderMoved as error:
            self.sync.request_read(name)
            raise AdapterPending(name) from error
        except AdapterRejected as error:
            raise ModelNotFound(name, refused=error.reason) from error

    async def served(self, name: str) -> Adapter:
        """The version that a bare name refers to. Raises ``ModelNotFound``, ``AdapterPending``."""
        return (await self.find((ModelRef(name),)))[0]

    def not_found(self, model: str, may_use: MayUse = anything) -> ModelNotFound:
        """The error for a name that is not served, with the reason if its folder was refused, or the nearest names."""
        _, reason = self.sync.refusals.get(model, (None, None))
        if reason is not None and may_use(model):
            return ModelNotFound(model[:200], refused=reason)
        return ModelNotFound(model[:200], nearest=self.names.nearest(model, may_use))

    def delta_norm(self, weights_digest: str) -> float | None:
        """The Frobenius norm of an adapter's weight change; None until it was loaded once."""
        loaded = self._loaded.get(weights_digest)
        return None if loaded is None else loaded.delta_norm

    def num_bytes(self, adapter: Adapter) -> int:
        """Bytes that an adapter takes in memory; an upper bound until it was loaded once."""
        loaded = self._loaded.get(adapter.weights_digest)
        return adapter.listing.plan.num_bytes if loaded is None else loaded.num_bytes

    def set_aliases(self, aliases: Mapping[str, Alias]) -> None:
        for name in aliases:
            if name in self.registry:
                logger.warning("alias %s is ignored: an adapter has the same name", name)
            if name in self.names.base_names:
                logger.warning("alias %s is ignored: the base has the same name", name)
        self.names.aliases = aliases

    def set_pins(self, pins: Mapping[str, Pin]) -> None:
        """Replace the pins by name: a version to serve instead of the folder's, or weights to keep in memory."""
        before = [entry.served for entry in self.registry]
        self.registry.pins = pins
        for adapter in before:
            if adapter is not None:
                self._drop_unwanted(adapter)
                self._show_version(adapter.name)
        self.preload()

    def preload(self) -> None:
        """Load the adapters that are pinned in memory, in the background."""
        pinned = [entry for entry in self.registry if self._keeps_in_memory(entry)]
        self.cache.pin(entry.served.weights_digest for entry in pinned if entry.served is not None)
        for entry in pinned:
            in_memory = entry.served is not None and entry.served.weights_digest in self.cache
            if not in_memory and entry.name not in self._preloading:
                self._preloading[entry.name] = asyncio.ensure_future(self._preload(entry.name))

    def _keeps_in_memory(self, entry: Entry) -> bool:
        """Whether it is pinned in memory, or to a version that exists only there."""
        if entry.pin.resident:
            return True
        return self.registry.retain and entry.served is not None and entry.served is not entry.current

    async def _preload(self, name: str) -> None:
        try:
            await self._preload_once(name)
        finally:
            del self._preloading[name]

    async def _preload_once(self, name: str) -> None:
        try:
            lease = await self._lease((ModelRef(name),))
        except (ModelNotFound, AdapterRejected, AdapterNotLoaded, FolderMoved, QueueFull) as error:
            logger.warning("loading the pinned adapter %s failed: %s", name, error)
            return
        entry = self.registry.find(name)
        if entry is not None and entry.served is not None and self._keeps_in_memory(entry):
            self.cache.pin({*self.cache.pinned, entry.served.weights_digest})
        lease.release()

    async def _lease(self, refs: tuple[ModelRef, ...], may_use: MayUse = anything) -> Lease:
        adapters = tuple([LeasedAdapter(await self._usable(ref, may_use), ref.scale) for ref in refs])
        check_composition(adapters)
        by_digest = {leased.adapter.weights_digest: leased.adapter for leased in adapters}
        needs = {digest: self.num_bytes(adapter) for digest, adapter in by_digest.items()}
        if sum(needs.values()) > self.cache.max_bytes:
            raise InvalidRequest("The adapters do not fit into memory together.", param="model")
        try:
            await self.cache.hold(needs, lambda digest: self._load(by_digest[digest]))
        finally:
            self._report()  # weights may have been evicted even if it failed
        names = {leased.adapter.name for leased in adapters}
        self._in_use.update(names)
        for name in names:
            self.metrics.know_adapter(name)
            self._show_version(name)
        return Lease(adapters, lambda: self._release(adapters))

    async def _usable(self, ref: ModelRef, may_use: MayUse) -> Adapter:
        """A version that the key may use. Raises the same ``ModelNotFound`` for what is hidden and what is missing."""
        if not may_use(ref.name):
            raise ModelNotFound(ref.name if ref.version is None else f"{ref.name}@{ref.version}")
        return await self._version(ref)

    async def _version(self, ref: ModelRef) -> Adapter:
        """The version that a reference means: by its digest, else the pinned one, else the folder's."""
        entry = self.registry.find(ref.name)
        version = ref.version
        if version is None:
            entry = self.registry.get(ref.name)
            version = entry.pin.version
            if version is None:
                return entry.current or await self.sync.hash(entry)
        if entry is None:
            return await self._kept(ref.name, version, None)
        adapter = entry.known(version) or await self._kept(ref.name, version, entry)
        entry.asked.add(adapter.version_digest)
        return adapter

    async def _kept(self, name: str, version: str, entry: Entry | None) -> Adapter:
        """A version that is not known yet: the folder's own, or one from the state directory."""
        if entry is not None:
            await self.sync.hash(entry)
        versions = [] if entry is None else entry.versions
        known = {adapter.version_digest: adapter for adapter in versions}
        matching = {digest for digest in known if digest.startswith(version)}
        digests = sorted(matching.union(await self.reader.find_kept(name, version)))
        if len(digests) == 1 and digests[0] in known:
            return known[digests[0]]
        if len(digests) > 1:
            shown = ", ".join(digest[:12] for digest in digests[:4])
            raise InvalidRequest(f"'{name}@{version}' is ambiguous ({shown}): give more digits.", param="model")
        manifest = await self.reader.kept(name, digests[0]) if digests else None
        if manifest is None:
            raise ModelNotFound(f"{name}@{version}")
        adapter = Adapter.of(manifest)
        if entry is not None:
            self.registry.remember(entry, adapter)
        return adapter

    async def _load(self, adapter: Adapter) -> int:
        """Read and hash a version's files again, and load its weights; returns their bytes in memory."""
        async with self._max_loads:
            with self.metrics.adapter_load_seconds.time():
                return await self._read_and_load(adapter)

    async def _read_and_load(self, adapter: Adapter) -> int:
        with _loading(adapter.name):
            manifest = await self._bytes_of(adapter)
        try:
            return await self._load_into_engine(manifest)
        except AdapterRejected as error:
            entry = self.registry.find(adapter.name)
            if entry is not None and entry.current is adapter:
                self.sync.refuse(entry, error.reason)
            raise

    async def _load_into_engine(self, manifest: Manifest) -> int:
        with _loading(manifest.name):
            loaded = self._loaded[manifest.weights_digest] = await self._load_weights(manifest)
        return loaded.num_bytes

    async def _bytes_of(self, adapter: Adapter) -> Manifest:
        """A version's files, from its folder or the state directory. Raises ``FolderMoved`` or ``AdapterRejected``."""
        entry = self.registry.find(adapter.name)
        moved: Exception = FolderMoved(adapter.name)
        if entry is not None and entry.current is adapter:
            try:
                manifest = await self.reader.manifest(adapter.listing.path, entry.state, adapter.name)
                if manifest.version_digest == adapter.version_digest:
                    return manifest
            except (FolderMoved, AdapterRejected) as error:
                moved = error
            else:  # the cached digests of this folder were wrong
                self.registry.publish(Adapter.of(manifest), entry.state)
                raise moved
        kept = await self.reader.kept(adapter.name, adapter.version_digest)
        if kept is None and entry is not None and entry.current is adapter:
            kept = await self.reader.unchanged(adapter.listing.path, adapter.name, adapter.version_digest, entry.state)
        if kept is None:
            raise moved
        return kept

    def _release(self, adapters: tuple[LeasedAdapter, ...]) -> None:
        self.cache.release({leased.adapter.weights_digest for leased in adapters})
        for leased in adapters:
            self._drop_unwanted(leased.adapter)
        for name in {leased.adapter.name for leased in adapters}:
            self._in_use[name] -= 1
            self._forget_if_gone(name)
        self._report()

    def _is_gone(self, name: str, refs: tuple[ModelRef, ...]) -> bool:
        """Whether waiting for a folder is useless: it is gone, refused, or holds another version than requested."""
        entry = self.registry.find(name)
        if entry is None:
            return True
        version = next((ref.version for ref in refs if ref.name == name), None) or entry.pin.version
        if version is not None and not (entry.current and entry.current.version_digest.startswith(version)):
            return True
        if entry.refused is not None:
            self.sync.refuse(entry, entry.refused, other_base=self.sync.other_bases.get(name))
            return True
        return False

    @asynccontextmanager
    async def swapping(self, entry: Entry, adapter: Adapter, manifest: Manifest) -> AsyncIterator[None]:
        """Load the new version first if the old one is in memory and there is room for both."""
        before = entry.current
        needs = {adapter.weights_digest: manifest.plan.num_bytes}
        in_memory = before is not None and before.weights_digest in self.cache
        ahead = in_memory and entry.pin.version is None and self.cache.has_room(manifest.plan.num_bytes)
        try:
            if ahead:
                await self.cache.hold(needs, lambda digest: self._load_into_engine(manifest))
        except AdapterNotLoaded:
            ahead = False  # it is loaded when it is asked for
        try:
            yield
        finally:
            if ahead:
                self.cache.release(needs)
            if before is not None:
                self._drop_unwanted(before)
            self.preload()
            self._show_version(entry.name)
            self._report()

    def _drop_unwanted(self, adapter: Adapter) -> None:
        """Free idle weights that no request can use any more, and forget their size and norm."""
        digest = adapter.weights_digest
        self.cache.drop_unwanted(digest)
        if digest not in self.cache and not self.registry.is_wanted(digest):
            self._loaded.pop(digest, None)

    def added(self, entry: Entry) -> None:
        if entry.pin.resident:
            self.preload()

    def has_weights(self, entry: Entry) -> bool:
        """Whether the version that a name refers to is in memory, being loaded, or kept."""
        served = entry.served
        if served is not None and served.weights_digest in self.cache:
            return True
        version = entry.pin.version
        if version is None and entry.current is not None:
            version = entry.current.version_digest
        return version is not None and self.reader.has_kept(version)

    def removed(self, entry: Entry) -> None:
        if entry.pin.resident:
            self.preload()
        for adapter in entry.versions:
            self._drop_unwanted(adapter)
        self._forget_if_gone(entry.name)
        self._report()

    def _forget_if_gone(self, name: str) -> None:
        """Drop the metrics of a removed name once no request uses it."""
        if self._in_use[name] <= 0:
            del self._in_use[name]
            if name not in self.registry:
                self.metrics.forget_adapter(name)

    def _show_version(self, name: str) -> None:
        entry = self.registry.find(name)
        served = None if entry is None else entry.served
        self.metrics.show_version(name, None if served is None else served.version_digest[:DIGITS])

    def _report(self) -> None:
        self.metrics.adapters_resident.set(len(self.cache.digests))
        self.metrics.adapter_memory.set(self.cache.num_bytes)


@contextmanager
def _loading(name: str) -> Iterator[None]:
    """Log an unexpected exception and raise ``AdapterNotLoaded`` instead."""
    try:
        yield
    except (QuickchangeError, FolderMoved):
        raise
    except Exception as error:
        logger.exception("loading adapter %s failed", name)
        raise AdapterNotLoaded(name) from error
