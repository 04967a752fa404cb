"""Adapter versions kept on disk, so that each stays addressable after its folder was replaced and after a restart.

Under the state directory: ``versions/<version digest>/`` with an adapter's files, ``history/<name>.json`` with the
versions of a name, ``pins/<name>.json``, and ``digests.json``. Everything is written beside its place as ``.tmp-*``,
synced, and renamed; writers, of all threads and processes, take turns by a lock on ``.lock``, readers need none.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from server.adapters.names import is_name

logger = logging.getLogger("quickchange.adapters")

SCHEMA_VERSION = 1
DIGITS = 12
"""Digits of a version's digest in headers, logs and lists."""
LEFTOVER_SECONDS = 3600
_DIGEST = re.compile(r"[0-9a-f]{64}")
_TEMPORARY = ".tmp-"
_Content = TypeVar("_Content")

JsonTuple = str | int | tuple["JsonTuple", ...]
"""A JSON value whose lists are tuples."""


@dataclass(frozen=True)
class KeptVersion:
    """A version of a name, and when it became the newest, in unix seconds."""

    digest: str
    kept_at: int


@dataclass(frozen=True)
class Pin:
    """What an operator wants of a name: to be held at ``version`` whatever its folder says, to stay in memory."""

    version: str | None = None
    resident: bool = False


@dataclass(frozen=True)
class CachedDigest:
    """The digests of a folder that looked like ``state``, so that it need not be read again."""

    state: JsonTuple
    weights_digest: str
    version_digest: str


class VersionStore:
    """The state directory, which need not exist yet; ``keep`` is how many versions a name keeps besides a pinned one.

    Calls block. They raise ``OSError`` where the disk is full or may not be written, and the store is then as it was;
    ``ValueError`` for what is no name or no version digest.
    """

    def __init__(self, state_dir: Path, *, keep: int) -> None:
        self.state_dir, self.keep = state_dir, keep
        self._warned: dict[Path, bytes] = {}

    def put(self, name: str, version_digest: str, files: Mapping[str, bytes]) -> None:
        """Keep a version as the newest of its name, and drop those of the name that are too many."""
        path, digest = self._path("history", name), _checked(version_digest)
        if wrong := [file for file in files if not is_name(file)]:
            raise ValueError(f"{wrong[0]!r:.80} is no name for a file of an adapter")
        with self._writing():
            before = self.versions(name)
            after = before
            if not before or before[-1].digest != digest:
                after = [version for version in before if version.digest != digest] + [
                    KeptVersion(digest, int(time.time()))
                ]
            after = self._pruned(name, after)
            if after == before:
                return
            try:
                if self.folder(digest) is None and any(version.digest == digest for version in after):
                    self._publish(digest, files)
                self._write(path, {"versions": [vars(version) for version in after]})
                if not {version.digest for version in before} <= {version.digest for version in after}:
                    self._sweep()
            except OSError:
                with contextlib.suppress(OSError):
                    self._sweep()
                raise

    def versions(self, name: str) -> list[KeptVersion]:
        """The versions of a name that are there, oldest first."""
        history = self._read(self._path("history", name), _parse_history) or []
        return [version for version in history if self.folder(version.digest) is not None]

    def names(self) -> list[str]:
        return self._names("history")

    def folder(self, version_digest: str) -> Path | None:
        """Where a version's files are, if it is kept."""
        path = self.state_dir / "versions" / _checked(version_digest)
        return path if path.is_dir() else None

    def forget(self, name: str) -> None:
        """Drop a name's history and pin, and its versions where no other name has them."""
        pin, history = self._path("pins", name), self._path("history", name)
        with self._writing():
            _unlink(pin)
            _unlink(history)
            self._sweep()

    def pins(self) -> dict[str, Pin]:
        """The pins by name; a file that cannot be understood is reported once and ignored."""
        read = {name: self._read(self._path("pins", name), _parse_pin) for name in self._names("pins")}
        return {name: pin for name, pin in read.items() if pin is not None and pin != Pin()}

    def set_pin(self, name: str, pin: Pin) -> None:
        """Replace a name's pin; ``Pin()`` removes it. What it held is dropped when the next version is put."""
        path = self._path("pins", name)
        if pin.version is not None:
            _checked(pin.version)
        with self._writing():
            if pin != Pin():
                self._write(path, vars(pin))
            else:
                _unlink(path)

    def pins_state(self) -> object:
        """Equal as long as no pin changed, and cheaper than reading them."""
        with contextlib.suppress(FileNotFoundError):
            found = [(path.name, path.lstat()) for path in (self.state_dir / "pins").iterdir()]
            return sorted((name, status.st_ino, status.st_mtime_ns, status.st_size) for name, status in found)
        return []

    def load_digests(self) -> dict[str, CachedDigest]:
        """What ``save_digests`` saved; empty, with a warning, where the file cannot be understood."""
        return self._read(self.state_dir / "digests.json", _parse_digests) or {}

    def save_digests(self, digests: Mapping[str, CachedDigest]) -> None:
        with self._writing():
            content = {path: _cached_json(cached) for path, cached in digests.items()}
            self._write(self.state_dir / "digests.json", {"digests": content})

    def _path(self, folder: str, name: str) -> Path:
        if not is_name(name):
            raise ValueError(f"{name!r:.80} is no adapter's name")
        return self.state_dir / folder / f"{name}.json"

    def _names(self, folder: str) -> list[str]:
        try:
            paths = list((self.state_dir / folder).iterdir())
        except FileNotFoundError:
            return []
        return sorted(path.stem for path in paths if path.suffix == ".json" and is_name(path.stem))

    def _pruned(self, name: str, versions: list[KeptVersion]) -> list[KeptVersion]:
        path = self._path("pins", name)
        pin = self._read(path, _parse_pin)
        if pin is None and path.exists():
            return versions  # which one is pinned cannot be told
        pinned = pin.version if pin else None
        first = len(versions) - self.keep
        return [version for index, version in enumerate(versions) if index >= first or version.digest == pinned]

    def _sweep(self) -> None:
        """Remove the versions that no history and no pin mentions; none while there is a history that can't be read."""
        mentioned = {pin.version for pin in self.pins().values()}
        for name in self.names():
            history = self._read(self._path("history", name), _parse_history)
            if history is None:
                return
            mentioned.update(version.digest for version in history)
        for path in (self.state_dir / "versions").iterdir():
            if _DIGEST.fullmatch(path.name) and path.name not in mentioned:
                with self._temporary() as doomed:
                    path.rename(doomed)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Be the only writer. What others left behind when they crashed is removed."""
        for folder in ("versions", "history", "pins"):
            (self.state_dir / folder).mkdir(parents=True, exist_ok=True)
        with open(self.state_dir / ".lock", "ab", opener=_open) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for path in self.state_dir.glob(f"{_TEMPORARY}*"):
                with contextlib.suppress(FileNotFoundError):
                    if path.lstat().st_mtime < time.time() - LEFTOVER_SECONDS:
                        _remove(path)
            yield

    @contextlib.contextmanager
    def _temporary(self) -> Iterator[Path]:
        """A path that is free; what is still there at the end is removed."""
        path = self.state_dir / f"{_TEMPORARY}{uuid.uuid4().hex}"
        try:
            yield path
        finally:
            _remove(path)

    def _publish(self, digest: str, files: Mapping[str, bytes]) -> None:
        target = self.state_dir / "versions" / digest
        with self._temporary() as folder:
            folder.mkdir()
            for name, data in files.items():
                _write_file(folder / name, data)
            _sync(folder)
            folder.rename(target)
        _sync(target.parent)

    def _write(self, path: Path, content: Mapping[str, Any]) -> None:
        with self._temporary() as temporary:
            _write_file(temporary, json.dumps({"schema_version": SCHEMA_VERSION, **content}).encode() + b"\n")
            os.replace(temporary, path)
        _sync(path.parent)

    def _read(self, path: Path, parse: Callable[[Any], _Content]) -> _Content | None:
        """A file's content; None where there is none, and, with one warning for a content, where it can't be used."""
        data = b""
        try:
            data = path.read_bytes()
            return parse(json.loads(data))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            if self._warned.get(path) != data:
                self._warned[path] = data
                logger.warning("%s cannot be used (%s) and is ignored", path.relative_to(self.state_dir), error)
            return None


def _parse_history(value: Any) -> list[KeptVersion]:
    match value:
        case {"schema_version": 1, "versions": [*versions]}:
            return [_parse_kept(version) for version in versions]
    raise ValueError("it is no history of schema version 1")


def _parse_kept(value: Any) -> KeptVersion:
    match value:
        case {"digest": str(digest), "kept_at": int(kept_at)}:
            return KeptVersion(_checked(digest), kept_at)
    raise ValueError("it lacks a version's digest or time")


def _parse_pin(value: Any) -> Pin:
    match value:
        case {"schema_version": 1, "version": str() | None as version, "resident": bool(resident)} if len(value) == 3:
            return Pin(None if version is None else _checked(version), resident)
    raise ValueError("it is no pin of schema version 1")


def _parse_digests(value: Any) -> dict[str, CachedDigest]:
    match value:
        case {"schema_version": 1, "digests": dict(digests)}:
            return {key: _parse_cached(digest) for key, digest in digests.items()}
    raise ValueError("it is no cache of schema version 1")


def _parse_cached(value: Any) -> CachedDigest:
    match value:
        case {"signature": state, "weights_digest": str(weights), "version_digest": str(version)}:
            return CachedDigest(_parse_state(state), _checked(weights), _checked(version))
    raise ValueError("it lacks a signature or a digest")


def _cached_json(cached: CachedDigest) -> dict[str, Any]:
    digests = {"weights_digest": cached.weights_digest, "version_digest": cached.version_digest}
    return {"signature": cached.state, **digests}


def _parse_state(value: Any) -> JsonTuple:
    if isinstance(value, list):
        return tuple(_parse_state(item) for item in value)
    if isinstance(value, str) or type(value) is int:
        return value
    raise ValueError("a signature is of texts and integers")


def _checked(digest: str) -> str:
    if not _DIGEST.fullmatch(digest):
        raise ValueError(f"{digest!r:.80} is no version digest")
    return digest


def _open(path: str, flags: int) -> int:
    return os.open(path, flags, 0o644)


def _write_file(path: Path, data: bytes) -> None:
    with open(path, "xb", opener=_open) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        path.unlink()


def _unlink(path: Path) -> None:
    path.unlink(missing_ok=True)
    _sync(path.parent)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
