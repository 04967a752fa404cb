"""Which adapters can be asked for, and who is using which. The event loop owns it, so there are no locks."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from server.adapters.manifest import Manifest
from server.adapters.sidecar import Sidecar, SidecarSampling
from server.errors import ModelNotFound


@dataclass(frozen=True)
class AdapterDefaults:
    """What applies where a request says nothing; ``stop`` is added to the request's own."""

    stop: tuple[str, ...] = ()
    system_prompt: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    max_tokens: int | None = None


@dataclass(frozen=True)
class Adapter:
    """One version of an adapter; it never changes. ``weights_digest`` names its rows in the LoRA bank."""

    name: str
    version_digest: str
    weights_digest: str
    rank: int
    num_bytes: int
    num_modules: int
    created: int
    path: Path
    defaults: AdapterDefaults

    @classmethod
    def of(cls, manifest: Manifest) -> Adapter:
        """The adapter of a folder that was read."""
        return cls(
            name=manifest.name,
            version_digest=manifest.version_digest,
            weights_digest=manifest.weights_digest,
            rank=manifest.rank,
            num_bytes=len(manifest.data),
            num_modules=len(manifest.pairs),
            created=manifest.created,
            path=manifest.path,
            defaults=_defaults(manifest.sidecar),
        )


def _defaults(sidecar: Sidecar | None) -> AdapterDefaults:
    if sidecar is None:
        return AdapterDefaults()
    sampling = sidecar.sampling or SidecarSampling()
    return AdapterDefaults(
        stop=tuple(sidecar.stop or ()),
        system_prompt=sidecar.system_prompt,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        max_tokens=sampling.max_tokens,
    )


class AdapterRegistry:
    """Names and leases. ``on_unused(weights_digest)`` is called when nobody can ask for those weights, or uses them."""

    def __init__(self, on_unused: Callable[[str], None]) -> None:
        self._on_unused = on_unused
        self._published: dict[str, Adapter] = {}
        self._leases: Counter[str] = Counter()

    def list(self) -> list[Adapter]:
        """The adapters that can be asked for, by name."""
        return [self._published[name] for name in sorted(self._published)]

    def get(self, name: str) -> Adapter:
        """The current version of an adapter. Raises ``ModelNotFound``."""
        try:
            return self._published[name]
        except KeyError:
            raise ModelNotFound(name) from None

    def acquire(self, name: str) -> Adapter:
        """The current version, which stays in memory until it is released. Raises ``ModelNotFound``."""
        adapter = self.get(name)
        self._leases[adapter.weights_digest] += 1
        return adapter

    def release(self, adapter: Adapter) -> None:
        """Give a lease back."""
        digest = adapter.weights_digest
        assert self._leases[digest] > 0, "released more often than acquired"
        self._leases[digest] -= 1
        self._free_if_unused(digest)

    def num_leases(self, weights_digest: str) -> int:
        """Requests that are using these weights."""
        return self._leases[weights_digest]

    @contextlib.contextmanager
    def holding(self, adapter: Adapter) -> Iterator[None]:
        """A lease on a version that has no name yet."""
        self._leases[adapter.weights_digest] += 1
        try:
            yield
        finally:
            self.release(adapter)

    def publish(self, adapter: Adapter) -> None:
        """Give a name to a loaded version; who holds the one before it keeps it."""
        before = self._published.get(adapter.name)
        self._published[adapter.name] = adapter
        if before is not None:
            self._free_if_unused(before.weights_digest)

    def withdraw(self, name: str) -> None:
        """Take a name away; who holds the adapter keeps it."""
        self._free_if_unused(self._published.pop(name).weights_digest)

    def check_integrity(self) -> None:
        """No lease is negative."""
        assert all(count >= 0 for count in self._leases.values())

    def _free_if_unused(self, digest: str) -> None:
        if self._leases[digest]:
            return
        del self._leases[digest]
        if all(adapter.weights_digest != digest for adapter in self._published.values()):
            self._on_unused(digest)
