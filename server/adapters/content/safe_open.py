"""Opens an adapter folder and its files safely: links are followed only into the operator's roots.

Files are opened relative to the folder's descriptor. A link's target is opened first, checked by its descriptor, and
read through the same descriptor, so a path that changes between check and read has no effect.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

PASSING = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EIO, errno.ESTALE, errno.EINTR})
"""Temporary errors of the system: the folder is read again later."""

_DENIED = frozenset({errno.EACCES, errno.EPERM})
_NO_FILE = frozenset({errno.ENXIO, errno.ENODEV, errno.EOPNOTSUPP})
_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
_O_PATH: int | None = getattr(os, "O_PATH", None)
"""Linux: opens a link's target without reading, which has no effect on a device or FIFO."""
_F_GETPATH: int | None = getattr(fcntl, "F_GETPATH", None)
"""macOS: the path of a descriptor."""
_IN_A_HUB = re.compile(r"/models--([^/]+)/(?:blobs|snapshots/([^/]+))/")
"""Repository and revision in a path of huggingface_hub's cache."""


class PermissionDenied(ValueError):
    """A file or folder exists, but the server's user may not read it."""


@dataclass
class Folder:
    """An open folder. Links are followed if their targets are inside one of ``roots``."""

    descriptor: int
    roots: Sequence[Path] = ()
    _places: dict[str, str] = field(default_factory=dict)

    @classmethod
    @contextlib.contextmanager
    def opened(cls, path: Path, roots: Sequence[Path] = ()) -> Iterator[Folder]:
        """Open a folder, which may be a link itself.

        Raises ``ValueError`` with reason and remedy; ``OSError`` for temporary errors.
        """
        descriptor, _ = _Target(os.fspath(path), "the folder", roots).open()
        try:
            yield cls(descriptor, roots)
        finally:
            os.close(descriptor)

    @property
    def hub_source(self) -> tuple[str, str] | None:
        """Repository and revision (may be empty) if the folder or a file of it is in a hub's cache."""
        places = [path_of(self.descriptor) or "", *self._places.values()]
        for place in places:
            match = _IN_A_HUB.search(f"{place}/")
            if match is not None:
                return match[1].replace("--", "/"), match[2] or ""
        return None

    def open(self, name: str) -> int | None:
        """A descriptor of a regular file in the folder; None if there is none. Raises as ``opened``."""
        target = _Target(name, name, self.roots, self.descriptor)
        try:
            descriptor, where = target.open()
        except FileNotFoundError:
            return None
        if where is not None:
            self._places[name] = where
        return descriptor

    def check_links(self) -> None:
        """Raises ``OSError`` if the target of a followed link changed.

        Then a link above it, such as ``..data`` of a Kubernetes volume, was replaced while the files were read, and
        they may be of two generations.
        """
        for name, where in self._places.items():
            if _Target(name, name, self.roots, self.descriptor).place() != where:
                raise OSError(errno.ESTALE, "links changed while the files were read")


@dataclass(frozen=True)
class _Target:
    """A file in an open folder, or a folder by its path; messages call it ``what``."""

    path: str
    what: str
    roots: Sequence[Path]
    folder: int | None = None

    def open(self) -> tuple[int, str | None]:
        """A descriptor to read from, and a link's target. Raises ``FileNotFoundError`` if there is no file."""
        try:
            descriptor = os.open(self.path, self._flags | os.O_NOFOLLOW, dir_fd=self.folder)
        except OSError as error:
            if error.errno == errno.ENOENT and self.folder is not None:
                raise
            if self.link:
                return self._follow()
            raise self._as_error(error, self.what) from None
        if not self._is_kind(descriptor):
            os.close(descriptor)
            raise ValueError(f"{self.what} is not a regular file")
        return descriptor, None

    @property
    def link(self) -> str:
        """A link's text; empty if the path is no link."""
        with contextlib.suppress(OSError):
            return os.readlink(self.path, dir_fd=self.folder)
        return ""

    def place(self) -> str | None:
        """A link's present target; None if it does not exist."""
        with contextlib.suppress(OSError, ValueError):
            found = self._open_target()
            try:
                return path_of(found)
            finally:
                os.close(found)
        return None

    def _follow(self) -> tuple[int, str]:
        named = f"{self.what} is a link to {self.link!r:.200}"
        try:
            found = self._open_target()
            try:
                where = self._checked_target(found, named)
                return self._reopened(found), where
            finally:
                os.close(found)
        except FileNotFoundError:
            raise ValueError(f"{named}, which does not exist: put the {self._kind} itself there") from None
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise ValueError(f"{named}, which leads in a circle: put the {self._kind} itself there") from None
            raise self._as_error(error, f"{self.what}, a link to {self.link!r:.200},") from None

    def _open_target(self) -> int:
        """A descriptor of the link's target; nothing is read, and no device or FIFO is opened."""
        if _O_PATH is not None:
            return os.open(self.path, _O_PATH | os.O_CLOEXEC, dir_fd=self.folder)
        mode = os.stat(self.path, dir_fd=self.folder).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise ValueError(f"{self.what} is a link to what is not a regular file")
        return os.open(self.path, _FLAGS, dir_fd=self.folder)

    def _reopened(self, found: int) -> int:
        """The file of a descriptor, opened for reading."""
        return os.dup(found) if _O_PATH is None else os.open(f"/proc/self/fd/{found}", self._flags)

    def _checked_target(self, found: int, named: str) -> str:
        """The path of a descriptor's file. Raises ``ValueError`` outside the roots and for another kind of file."""
        where = path_of(found)
        if where is None or not is_inside(where, _resolved(self.roots)):
            raise ValueError(
                f"{named}, which leads outside the folders that links may lead into: put the {self._kind} itself "
                "there, or name the folder it leads into in --adapter-roots"
            )
        if not self._is_kind(found):
            raise ValueError(f"{named}, which is not a {'folder' if self.folder is None else 'regular file'}")
        return where

    @property
    def _flags(self) -> int:
        return _FLAGS | (os.O_DIRECTORY if self.folder is None else 0)

    @property
    def _kind(self) -> str:
        return "folder" if self.folder is None else "file"

    def _is_kind(self, descriptor: int) -> bool:
        mode = os.fstat(descriptor).st_mode
        return stat.S_ISDIR(mode) if self.folder is None else stat.S_ISREG(mode)

    def _as_error(self, error: OSError, what: str) -> Exception:
        """The error to raise for a failed open."""
        if error.errno in PASSING:
            return error
        if error.errno in _DENIED:
            return PermissionDenied(self._denied(what))
        if error.errno in _NO_FILE:
            return ValueError(f"{what} is not a regular file")
        return ValueError(f"{what} cannot be opened: {error.strerror}")

    def _denied(self, what: str) -> str:
        """The message for a denied open: mode and owner, the server's user, remedies."""
        if self._is_unreachable():
            return self._unreachable()
        found, user = "", os.geteuid()
        with contextlib.suppress(OSError):  # a folder above it may be closed as well
            status = os.stat(self.path, dir_fd=self.folder)
            found = f"its mode is {stat.S_IMODE(status.st_mode):04o} and its owner {status.st_uid}; "
        return (
            f"permission denied: {what} cannot be read ({found}the server runs as user {user}): chmod "
            f"{'a+rx' if self.folder is None else 'a+r'} it, chown it to user {user}, or run the server as its owner"
        )

    def _is_unreachable(self) -> bool:
        """Whether a file's folder may be listed but not entered, such as another user's of mode 0744."""
        if self.folder is None:
            return False
        try:
            os.stat(self.path, dir_fd=self.folder, follow_symlinks=False)
        except OSError as error:
            return error.errno in _DENIED
        return False

    def _unreachable(self) -> str:
        assert self.folder is not None
        status, user = os.fstat(self.folder), os.geteuid()
        return (
            f"permission denied: {self.what} cannot be reached, because its folder may not be entered (the folder's "
            f"mode is {stat.S_IMODE(status.st_mode):04o} and its owner {status.st_uid}; the server runs as user "
            f"{user}): chmod a+rx the folder, chown it to user {user}, or run the server as its owner"
        )


def path_of(descriptor: int) -> str | None:
    """The path of an open file without links; None if the system does not tell."""
    with contextlib.suppress(OSError):
        if _F_GETPATH is not None:
            return os.fsdecode(fcntl.fcntl(descriptor, _F_GETPATH, bytes(1024)).rstrip(b"\0"))
        return os.readlink(f"/proc/self/fd/{descriptor}")
    return None


def is_inside(path: str, folders: Iterable[str]) -> bool:
    return any(path == folder or path.startswith(f"{folder.rstrip('/')}/") for folder in folders)


def leads_inside(path: str | os.PathLike[str], roots: Sequence[Path]) -> bool:
    """Whether a link's target is inside a root; checked by path, so not safe for reading."""
    where = os.path.realpath(path)
    return any(is_inside(where, [os.path.realpath(root)]) for root in roots)


def _resolved(roots: Sequence[Path]) -> Iterator[str]:
    """The paths of the existing roots, without links."""
    for root in roots:
        with contextlib.suppress(OSError):
            descriptor = os.open(root, _FLAGS | os.O_DIRECTORY)
            try:
                place = path_of(descriptor)
            finally:
                os.close(descriptor)
            if place is not None:
                yield place
