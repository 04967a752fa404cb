"""The names that requests can use, and their versions. Only the event loop uses it: no locks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from server.adapters.content.folder import FolderState
from server.adapters.content.generation_defaults import GenerationDefaults
from server.adapters.content.manifest import Listing, Manifest
from server.adapters.versions import DIGITS, Pin
from server.errors import ModelNotFound


@dataclass(frozen=True)
class Adapter:
    """One version of an adapter; immutable. ``weights_digest`` is the key of its weights in the engine."""

    listing: Listing
    weights_digest: str
    version_digest: str

    @classmethod
    def of(cls, manifest: Manifest) -> Adapter:
        return cls(manifest.listing, manifest.weights_digest, manifest.version_digest)

    @property
    def name(self) -> str:
        return self.listing.name

    @property
    def defaults(self) -> GenerationDefaults:
        return self.listing.defaults

    @property
    def label(self) -> str:
        """``name@digest``, which a request can give as ``model``."""
        return f"{self.name}@{self.version_digest[:DIGITS]}"


@dataclass(eq=False)
class Entry:
    """A name with its folder and versions.

    ``current`` is the folder's version, None until its bytes were hashed. ``older`` are previous versions, newest last;
    ``asked`` the digests of those that a request named. ``refused`` is the reason why the folder's present content is
    refused while an earlier version is served.
    """

    listing: Listing
    state: FolderState
    current: Adapter | None = None
    pin: Pin = field(default_factory=Pin)
    refused: str | None = None
    older: dict[str, Adapter] = field(default_factory=dict)
    asked: set[str] = field(default_factory=set)

    @property
    def name(self) -> str:
        return self.listing.name

    @property
    def served(self) -> Adapter | None:
        """The version that the bare name refers to, if known: the pinned one, else the folder's."""
        return self.current if self.pin.version is None else self.known(self.pin.version)

    def known(self, prefix: str) -> Adapter | None:
        """The known version with this prefix of its digest, if there is exactly one."""
        matching = [adapter for adapter in self.versions if adapter.version_digest.startswith(prefix)]
        return matching[0] if len(matching) == 1 else None

    @property
    def versions(self) -> list[Adapter]:
        """Every known version, oldest first."""
        current = [] if self.current is None else [self.current]
        return [*self.older.values(), *current]


class AdapterRegistry:
    """Names and their versions.

    ``keep`` is the number of older versions of a name. ``retain``: weights of replaced versions may stay in memory,
    because no state directory keeps them.
    """

    def __init__(self, *, keep: int = 3, retain: bool = True) -> None:
        self._keep, self.retain = keep, retain
        self._entries: dict[str, Entry] = {}
        self._names_of_weights: dict[str, set[str]] = {}
        self._pins: Mapping[str, Pin] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[Entry]:
        return iter([self._entries[name] for name in sorted(self._entries)])

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def names(self) -> AbstractSet[str]:
        return self._entries.keys()

    def get(self, name: str) -> Entry:
        """A name's entry. Raises ``ModelNotFound``."""
        try:
            return self._entries[name]
        except KeyError:
            raise ModelNotFound(name) from None

    def find(self, name: str) -> Entry | None:
        return self._entries.get(name)

    @property
    def pins(self) -> Mapping[str, Pin]:
        """Pins by name, of listed and unlisted names."""
        return self._pins

    @pins.setter
    def pins(self, pins: Mapping[str, Pin]) -> None:
        self._pins = dict(pins)
        for entry in self._entries.values():
            entry.pin = self._pins.get(entry.name, Pin())

    def add(self, listing: Listing, state: FolderState) -> Entry:
        """List a name whose bytes are not hashed yet."""
        entry = self._entries[listing.name] = Entry(listing, state, pin=self._pins.get(listing.name, Pin()))
        return entry

    def publish(self, adapter: Adapter, state: FolderState) -> None:
        """Set the current version of a name, known or new."""
        entry = self._entries.get(adapter.name) or self.add(adapter.listing, state)
        entry.listing = adapter.listing
        entry.state = state
        entry.refused = None
        before = entry.current
        if before is not None and before.version_digest == adapter.version_digest:
            return
        if before is not None:
            self._remember(entry, before)
        entry.older.pop(adapter.version_digest, None)
        entry.current = adapter
        self._names_of_weights.setdefault(adapter.weights_digest, set()).add(adapter.name)

    def remember(self, entry: Entry, adapter: Adapter) -> None:
        """Add a kept version to a name's older ones."""
        if entry.known(adapter.version_digest) is None:
            entry.older = {adapter.version_digest: adapter, **entry.older}
            self._names_of_weights.setdefault(adapter.weights_digest, set()).add(adapter.name)

    def withdraw(self, name: str) -> Entry:
        """Remove a name. Leases of its versions stay valid."""
        return self._entries.pop(name)

    def names_of_weights(self, weights_digest: str) -> list[str]:
        """The listed names that have a version with these weights."""
        return [name for name in self._names_of_weights.get(weights_digest, ()) if name in self._entries]

    def is_wanted(self, weights_digest: str) -> bool:
        """Whether a request may use these weights again, so that they may stay in memory."""
        names = self._names_of_weights.get(weights_digest, ())
        entries = [self._entries[name] for name in names if name in self._entries]
        if not any(weights_digest == adapter.weights_digest for entry in entries for adapter in entry.versions):
            self._names_of_weights.pop(weights_digest, None)
        return any(weights_digest == adapter.weights_digest for entry in entries for adapter in self._wanted(entry))

    def _wanted(self, entry: Entry) -> list[Adapter]:
        """The versions of a name whose weights may stay in memory."""
        if self.retain:
            return entry.versions
        wanted = [adapter for digest, adapter in entry.older.items() if digest in entry.asked]
        wanted += [adapter for adapter in (entry.current, entry.served) if adapter is not None]
        return wanted

    def _remember(self, entry: Entry, adapter: Adapter) -> None:
        entry.older.pop(adapter.version_digest, None)
        entry.older[adapter.version_digest] = adapter
        spare = [digest for digest in entry.older if not _is_pinned(entry, digest)]
        for digest in spare[: max(0, len(entry.older) - self._keep)]:
            dropped = entry.older.pop(digest)
            entry.asked.discard(digest)
            self.is_wanted(dropped.weights_digest)


def _is_pinned(entry: Entry, digest: str) -> bool:
    return entry.pin.version is not None and digest.startswith(entry.pin.version)
