"""Which adapters can be asked for, and at which version each name stands. The event loop owns it: no locks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
    """A name: the folder behind it, and its versions.

    ``current`` is None until the folder's bytes were hashed. ``older`` are versions it had before, newest last.
    ``asked`` are those of them that were asked for by their digest. ``refused`` says why what the folder holds now is
    not served, while an earlier version is.
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
        """The version that the bare name means, if it is known: the pinned one, else the folder's."""
        return self.current if self.pin.version is None else self.known(self.pin.version)

    def known(self, prefix: str) -> Adapter | None:
        """A version by the beginning of its digest, if it was read before and no other begins so."""
        found = [adapter for adapter in self.versions if adapter.version_digest.startswith(prefix)]
        return found[0] if len(found) == 1 else None

    @property
    def versions(self) -> list[Adapter]:
        """Every version that was read, oldest first."""
        versions = list(self.older.values())
        if self.current is not None:
            versions.append(self.current)
        return versions


class AdapterRegistry:
    """Names and their versions.

    ``keep`` versions of a name are remembered. With ``retain`` the weights of versions that were replaced stay wanted
    in memory, because they are nowhere else.
    """

    def __init__(self, *, keep: int = 3, retain: bool = True) -> None:
        self._keep, self.retain = keep, retain
        self._entries: dict[str, Entry] = {}
        self._names: dict[str, set[str]] = {}
        self._pins: Mapping[str, Pin] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[Entry]:
        return iter([self._entries[name] for name in sorted(self._entries)])

    def __len__(self) -> int:
        return len(self._entries)

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
        """What operators want of names, whether they are listed or not."""
        return self._pins

    @pins.setter
    def pins(self, pins: Mapping[str, Pin]) -> None:
        self._pins = dict(pins)
        for entry in self._entries.values():
            entry.pin = self._pins.get(entry.name, Pin())

    def add(self, listing: Listing, state: FolderState) -> Entry:
        """List a name whose bytes are still to be hashed."""
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
        self._names.setdefault(adapter.weights_digest, set()).add(adapter.name)

    def remember(self, entry: Entry, adapter: Adapter) -> None:
        """Note a version of a name that was found among those kept."""
        if entry.known(adapter.version_digest) is None:
            entry.older = {adapter.version_digest: adapter, **entry.older}
            self._names.setdefault(adapter.weights_digest, set()).add(adapter.name)

    def withdraw(self, name: str) -> Entry:
        """Take a name away; who holds one of its versions keeps it."""
        return self._entries.pop(name)

    def is_wanted(self, weights_digest: str) -> bool:
        """Whether somebody could ask for these weights again without reading a file."""
        entries = [self._entries[name] for name in self._names.get(weights_digest, ()) if name in self._entries]
        if not any(weights_digest == adapter.weights_digest for entry in entries for adapter in entry.versions):
            self._names.pop(weights_digest, None)
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
