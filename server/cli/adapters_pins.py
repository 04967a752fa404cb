"""``quickchange adapters pin``, ``unpin`` and ``rollback``: the version of a name, and whether it stays in memory.

They write pin files into the state directory, which a running server watches. No base is loaded.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence

from server.adapters.names import is_name
from server.adapters.versions import DIGITS, KeptVersion, Pin, VersionStore
from server.cli.command_line import command_parser, parse_options, parse_settings

PIN = """\
Without a version: keep the adapter in memory. With a version, as in helpdesk@ab12: serve that kept version under the
name, whatever its folder holds. VERSION is a prefix of a version's digest, 4 digits or more; `quickchange adapters
list` shows the versions kept in --state-dir. A running server applies the change within seconds."""

UNPIN = """\
Remove an adapter's pin: the name follows its folder again, and idle weights may be evicted. A running server applies
the change within seconds."""

ROLLBACK = """\
Pin a name to the previous version: the one before the pinned version if there is a pin, else before the newest that is
kept in --state-dir. A running server applies the change within seconds; `quickchange adapters unpin` ends it."""

_HEX = frozenset("0123456789abcdef")


class NotPinned(Exception):
    """Nothing was written. The text is printed."""


def run_pin(arguments: Sequence[str]) -> int:
    return _run("pin", "NAME[@VERSION]", PIN, pin, arguments)


def run_unpin(arguments: Sequence[str]) -> int:
    return _run("unpin", "NAME", UNPIN, unpin, arguments)


def run_rollback(arguments: Sequence[str]) -> int:
    return _run("rollback", "NAME", ROLLBACK, roll_back, arguments)


def pin(store: VersionStore, text: str) -> str:
    """Pin ``NAME`` or ``NAME@VERSION``; returns a line to print. Raises ``NotPinned``."""
    name, at, prefix = text.partition("@")
    before = _pin_of(store, name)
    if not at:
        store.set_pin(name, Pin(before.version, resident=True))
        unknown = "" if store.versions(name) else f", as soon as it exists: {store.state_dir} keeps no version yet"
        return f"{name} stays in memory{unknown}"
    version = _find(store, name, prefix.lower())
    store.set_pin(name, Pin(version.digest, before.resident))
    return f"{name} is pinned to {describe(version)}"


def unpin(store: VersionStore, name: str) -> str:
    """Remove a pin; returns a line to print. Raises ``NotPinned``."""
    before = _pin_of(store, name)
    store.set_pin(name, Pin())
    if before == Pin():
        return f"{name} was not pinned"
    words = []
    if before.version is not None:
        words.append(f"pinned to {before.version[:DIGITS]}")
    if before.resident:
        words.append("kept in memory")
    return f"{name} is no longer {' nor '.join(words)}"


def roll_back(store: VersionStore, name: str) -> str:
    """Pin the previous version; returns a line to print. Raises ``NotPinned``."""
    before, kept = _pin_of(store, name), store.versions(name)
    digests = [version.digest for version in kept]
    served = before.version or (digests[-1] if digests else None)
    earlier = kept[: digests.index(served)] if served in digests else kept
    if not earlier:
        raise NotPinned(f"{name} has no version before the served one; {_kept_list(store, name)}")
    store.set_pin(name, Pin(earlier[-1].digest, before.resident))
    return f"{name} is pinned to {describe(earlier[-1])}, no longer at {str(served)[:DIGITS]}"


def describe(version: KeptVersion) -> str:
    """A version's shortened digest, and the time since when it is kept."""
    return f"{version.digest[:DIGITS]} ({time.strftime('%Y-%m-%d %H:%M', time.gmtime(version.kept_at))} UTC)"


def _run(
    command: str, metavar: str, description: str, act: Callable[[VersionStore, str], str], arguments: Sequence[str]
) -> int:
    parser = command_parser(f"adapters {command}", description)
    parser.add_argument("name", metavar=metavar, help="the adapter")
    options, rest = parse_options(parser, arguments)
    settings = parse_settings(f"adapters {command}", rest)
    try:
        if settings.state_dir is None:
            raise NotPinned(
                "no state directory is set, which keeps pins and versions: give the server's --state-dir, or set "
                "QUICKCHANGE_STATE_DIR"
            )
        print(act(VersionStore(settings.state_dir, keep=settings.keep_versions), options.name))
    except NotPinned as error:
        print(f"quickchange: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"quickchange: {settings.state_dir} cannot be used: {error.strerror or error}", file=sys.stderr)
        return 1
    return 0


def _pin_of(store: VersionStore, name: str) -> Pin:
    if not is_name(name):
        raise NotPinned(f"{name!r:.80} is no adapter's name")
    return store.pins().get(name, Pin())


def _find(store: VersionStore, name: str, prefix: str) -> KeptVersion:
    if not 4 <= len(prefix) <= 64 or not _HEX.issuperset(prefix):
        raise NotPinned(f"{prefix!r:.80} is no version: write the first 4 to 64 hex digits; {_kept_list(store, name)}")
    matching = [version for version in store.versions(name) if version.digest.startswith(prefix)]
    if len(matching) > 1:
        raise NotPinned(
            f"{len(matching)} versions of {name} begin with {prefix}: give more digits; {_kept_list(store, name)}"
        )
    if not matching:
        raise NotPinned(f"no kept version of {name} begins with {prefix}; {_kept_list(store, name)}")
    return matching[0]


def _kept_list(store: VersionStore, name: str) -> str:
    """A clause that names the kept versions, newest first, or the names that have any."""
    if kept := store.versions(name):
        return "kept, newest first: " + ", ".join(describe(version) for version in reversed(kept))
    names = ", ".join(store.names()[:20])
    return f"{store.state_dir} keeps no version of {name}" + (f", only of {names}" if names else "")
