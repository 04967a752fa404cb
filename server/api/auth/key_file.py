"""The key file: a TOML table for each key, named by its label, with the SHA-256 of the key, never the key itself.

[web-shop]
sha256 = "8d2e...9f"            # 64 hex digits; a list of up to 4 while a key is being replaced
scopes = ["infer"]              # of infer, metrics, train, admin; infer where it is absent
adapters = ["helpdesk"]         # the only adapters that exist for this key; absent: all
requests_per_minute = 60        # absent: no limit
max_concurrent = 4              # absent: no limit
"""

from __future__ import annotations

import os
import re
import stat
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from server.api.auth.keys import ApiKey
from server.api.auth.principal import ANONYMOUS_LABEL, AccessScope, Principal

MAX_FILE_BYTES, MAX_KEYS, MAX_DIGESTS, MAX_LIMIT = 1024 * 1024, 1000, 4, 1_000_000
RESERVED_LABELS = frozenset({ANONYMOUS_LABEL, "admin_key", "api_key"})
LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
LABEL_RULE = f"letters, digits, '.', '_' and '-', 64 at most, and none of {', '.join(sorted(RESERVED_LABELS))}"
_DIGEST = re.compile(r"[0-9A-Fa-f]{64}")
_FIELDS = ("sha256", "scopes", "adapters", "requests_per_minute", "max_concurrent")
_MODES_OF_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def read_key_file(path: Path) -> list[ApiKey]:
    """The keys of a file. Raises ``ValueError`` with a sentence that names the entry, and ``OSError``.

    A file that others may read is accepted, as it holds digests only. One that others may write is refused.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO must not block
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is not a file")
        if status.st_mode & _MODES_OF_OTHERS:
            mode = stat.S_IMODE(status.st_mode)
            raise ValueError(f"other users may change it (mode {mode:04o}), and so add keys: chmod go-w {path}")
        data = file.read(MAX_FILE_BYTES + 1)
    return parse_keys(data)


def parse_keys(data: bytes) -> list[ApiKey]:
    """Raises ``ValueError``. No message repeats a digest, which may be a key by mistake."""
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"it has more than {MAX_FILE_BYTES} bytes")
    try:
        table = tomllib.loads(data.decode())
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"it is not valid TOML: {error}") from None
    except (UnicodeDecodeError, RecursionError):
        raise ValueError("it is not valid TOML") from None
    keys = [key for label, entry in table.items() for key in _keys(label, entry)]
    if len(keys) > MAX_KEYS:
        raise ValueError(f"it has {len(keys)} keys; the limit is {MAX_KEYS}")
    labels: dict[bytes, str] = {}
    for key in keys:
        other = labels.setdefault(key.digest, key.principal.label)
        if other != key.principal.label:
            raise ValueError(f"{other!r} and {key.principal.label!r} have the same key")
    return keys


def _keys(label: str, entry: Any) -> Iterator[ApiKey]:
    if LABEL.fullmatch(label) is None or label in RESERVED_LABELS:
        raise ValueError(f"{label!r:.80} is no label: use {LABEL_RULE}; labels with dots need quotes")
    if not isinstance(entry, dict):
        raise ValueError(f"{label!r} is not a table: write [{label}] and its fields below it")
    unknown = next((name for name in entry if name not in _FIELDS), None)
    if unknown is not None:
        raise ValueError(f"{label!r} has the field {unknown!r:.80}, which does not exist; known: {', '.join(_FIELDS)}")
    principal = _principal(label, entry)
    for digest in _digests(label, entry):
        yield ApiKey(digest, principal)


def _principal(label: str, entry: Mapping[str, Any]) -> Principal:
    names = _strings(label, "scopes", entry.get("scopes", [AccessScope.INFER.value]))
    known = [scope.value for scope in AccessScope]
    wrong = next((name for name in names if name not in known), None)
    if wrong is not None or not names:
        raise ValueError(f"{label!r} has the scope {wrong!r:.80}: scopes are {', '.join(known)}, at least one of them")
    scopes = frozenset(map(AccessScope, names))
    adapters = None
    if "adapters" in entry:
        adapters = frozenset(_strings(label, "adapters", entry["adapters"]))
        if AccessScope.ADMIN in scopes:
            raise ValueError(f"{label!r} has 'adapters' and the scope admin, which changes every adapter: remove one")
    return Principal(
        f"key:{label}",
        label,
        scopes,
        adapters,
        max_concurrent=_limit(label, entry, "max_concurrent"),
        requests_per_minute=_limit(label, entry, "requests_per_minute"),
    )


def _digests(label: str, entry: Mapping[str, Any]) -> list[bytes]:
    value = entry.get("sha256")
    texts = value if isinstance(value, list) else [value]
    if not 1 <= len(texts) <= MAX_DIGESTS:
        raise ValueError(f"{label!r} has {len(texts)} digests in 'sha256': 1 to {MAX_DIGESTS} are allowed")
    digests = [text for text in texts if isinstance(text, str) and _DIGEST.fullmatch(text)]
    if digests != texts:
        raise ValueError(
            f"{label!r} needs 'sha256', the SHA-256 of its key in 64 hex digits, not the key itself: "
            "`quickchange keys new` prints an entry"
        )
    return [bytes.fromhex(text) for text in digests]


def _strings(label: str, name: str, value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ValueError(f"{label!r} has {name!r} that is no list of strings")
    return value


def _limit(label: str, entry: Mapping[str, Any], name: str) -> int | None:
    value = entry.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_LIMIT:
        raise ValueError(f"{label!r} has {name} = {value!r:.80}: it must be a whole number from 1 to {MAX_LIMIT:,}")
    return value
