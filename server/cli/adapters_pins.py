"""``quickchange adapters pin``, ``unpin`` and ``rollback``: which version a name means, and whether it stays in memory.

They write small files into the state directory, which a running server watches; no base is loaded.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence

from server.adapters.names import is_name
from server.adapters.versions import KeptVersion, Pin, VersionStore
from server.cli.command_line import command_parser, parse_options, parse_settings

PIN = """\
Without a version: keep an adapter in memory, whatever else is used. With one, as in helpdesk@ab12: hold the name at
that kept version, whatever its folder says. VERSION is the beginning of a version's digest, 4 digits or more;
`quickchange adapters list` shows those that are kept in --state-dir. A running server obeys within seconds."""

UNPIN = """\
Let a name follow its folder again, and leave memory when it is not used. A running server obeys within seconds."""

ROLLBACK = """\
Hold a name at the version before the one that is served: before the pinned one where there is a pin, else before the
newest that is kept in --state-dir. A running server obeys within seconds; `quickchange adapters unpin` ends it."""

_DIGITS = 12
_HEX = frozenset("0123456789abcdef")


class NotPinned(Exception):
    """Nothing was written; the text is for the person at the terminal."""


def run_pin(arguments: Sequence[str]) -> int:
    return _run("pin", "NAME[@VERSION]", PIN, pin, arguments)


def run_unpin(arguments: Sequence[str]) -> int:
    return _run("unpin", "NAME", UNPIN, unpin, arguments)


def run_rollback(arguments: Sequence[str]) -> int:
    return _run("rollback", "NAME", ROLLBACK, roll_back, arguments)


def pin(store: VersionStore, text: str) -> str:
    """Pin ``NAME`` or ``NAME@VERSION``; a line that says what was done. Raises ``NotPinned``."""
    name, at, prefix = text.partition("@")
    before = _pin_of(store, name)
    if not at:
        store.set_pin(name, Pin(before.version, resident=True))
        unseen = "" if store.versions(name) else f", as soon as there is one: none was ever kept in {store.state_dir}"
        return f"{name} stays in memory{unseen}"
    version = _find(store, name, prefix.lower())
    store.set_pin(name, Pin(version.digest, before.resident))
    return f"{name} is held at {describe(version)}"


def unpin(store: VersionStore, name: str) -> str:
    """Remove a pin; a line that says what was done. Raises ``NotPinned``."""
    before = _pin_of(store, name)
    store.set_pin(name, Pin())
    if before == Pin():
        return f"{name} was not pinned"
    words = [f"held at {before.version[:_DIGITS]}"] if before.version is not None else []
    words += ["kept in memory"] if before.resident else []
    return f"{name} is no longer {' nor '.join(words)}"


def roll_back(store: VersionStore, name: str) -> str:
    """Pin the version before; a line that says what was done. Raises ``NotPinned``."""
    before, kept = _pin_of(store, name), store.versions(name)
    digests = [one.digest for one in kept]
    served = before.version or (digests[-1] if digests else None)
    earlier = kept[: digests.index(served)] if served in digests else kept
    if not earlier:
        raise NotPinned(f"there is no version of {name} before the one that is served; {_kept_list(store, name)}")
    store.set_pin(name, Pin(earlier[-1].digest, before.resident))
    return f"{name} is held at {describe(earlier[-1])}, no longer at {str(served)[:_DIGITS]}"


def describe(version: KeptVersion) -> str:
    """A version's digest, shortened, and since when it is kept."""
    return f"{version.digest[:_DIGITS]} ({time.strftime('%Y-%m-%d %H:%M', time.gmtime(version.kept_at))} UTC)"


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
                "pins and versions are kept in a state directory, and none is set: give the server's --state-dir, or "
                "set QUICKCHANGE_STATE_DIR"
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
    found = [one for one in store.versions(name) if one.digest.startswith(prefix)]
    if len(found) > 1:
        raise NotPinned(f"{len(found)} versions of {name} begin with {prefix}: write more; {_kept_list(store, name)}")
    if not found:
        raise NotPinned(f"no kept version of {name} begins with {prefix}; {_kept_list(store, name)}")
    return found[0]


def _kept_list(store: VersionStore, name: str) -> str:
    """What there is instead, newest first."""
    if kept := store.versions(name):
        return "kept, newest first: " + ", ".join(describe(one) for one in reversed(kept))
    names = ", ".join(store.names()[:20])
    return f"{store.state_dir} keeps no version of it" + (f", only of {names}" if names else "")
