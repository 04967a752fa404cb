"""Opens an adapter folder and its files, follows links inside the operator's roots, and says why one is not opened.

Files are opened relative to the folder's descriptor. Where a link leads is judged by the descriptor of what it led to,
which is then read by that same descriptor: what happens to a path between check and read changes nothing.
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
"""Errors of the system that say nothing of the folder: it is to be read again."""

_DENIED = frozenset({errno.EACCES, errno.EPERM})
_NO_FILE = frozenset({errno.ENXIO, errno.ENODEV, errno.EOPNOTSUPP})
_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
_O_PATH: int | None = getattr(os, "O_PATH", None)
"""Opens without reading, on Linux: a device or a FIFO behind a link does not notice."""
_F_GETPATH: int | None = getattr(fcntl, "F_GETPATH", None)
"""Asks macOS for the path of a descriptor."""
_IN_A_HUB = re.compile(r"/models--([^/]+)/(?:blobs|snapshots/([^/]+))/")
"""Where huggingface_hub keeps what it fetched."""


class PermissionDenied(ValueError):
    """A file or folder that is there, and that the server's user may not read."""


@dataclass
class Folder:
    """An open folder. A link is followed where what it leads to is inside one of ``roots``."""

    descriptor: int
    roots: Sequence[Path] = ()
    _places: dict[str, str] = field(default_factory=dict)

    @classmethod
    @contextlib.contextmanager
    def opened(cls, path: Path, roots: Sequence[Path] = ()) -> Iterator[Folder]:
        """A folder, which may be a link itself.

        Raises ``ValueError`` with a sentence, ``OSError`` where trying again may help.
        """
        descriptor, _ = _Target(os.fspath(path), "the folder", roots).open()
        try:
            yield cls(descriptor, roots)
        finally:
            os.close(descriptor)

    @property
    def hub_source(self) -> tuple[str, str] | None:
        """Repository and revision (which may be empty), where the folder or a file of it lies in a hub's cache."""
        places = [path_of(self.descriptor) or "", *self._places.values()]
        found = next((match for place in places if (match := _IN_A_HUB.search(f"{place}/"))), None)
        return None if found is None else (found[1].replace("--", "/"), found[2] or "")

    def open(self, name: str) -> int | None:
        """A descriptor of a regular file in the folder; None where there is none. Raises as ``opened``."""
        target = _Target(name, name, self.roots, self.descriptor)
        try:
            descriptor, where = target.open()
        except FileNotFoundError:
            return None
        if where is not None:
            self._places[name] = where
        return descriptor

    def check_links(self) -> None:
        """Raises ``OSError`` where a link that was followed leads elsewhere by now.

        Then a link on its way, as ``..data`` of a Kubernetes volume, was moved while files were read one after the
        other, and they may be of two generations.
        """
        for name, where in self._places.items():
            if _Target(name, name, self.roots, self.descriptor).place() != where:
                raise OSError(errno.ESTALE, "its links were moved while they were read")


@dataclass(frozen=True)
class _Target:
    """A file in an open folder, or a folder by its path; ``what`` is what sentences call it."""

    path: str
    what: str
    roots: Sequence[Path]
    folder: int | None = None

    def open(self) -> tuple[int, str | None]:
        """A descriptor to read from, and where a link led. Raises ``FileNotFoundError`` where no file is there."""
        try:
            descriptor = os.open(self.path, self._flags | os.O_NOFOLLOW, dir_fd=self.folder)
        except OSError as error:
            if error.errno == errno.ENOENT and self.folder is not None:
                raise
            if self.link:
                return self._follow()
            raise self._explained(error, self.what) from None
        if not self._is_kind(descriptor):
            os.close(descriptor)
            raise ValueError(f"{self.what} is not a regular file")
        return descriptor, None

    @property
    def link(self) -> str:
        """What a link says; empty where the path is none."""
        with contextlib.suppress(OSError):
            return os.readlink(self.path, dir_fd=self.folder)
        return ""

    def place(self) -> str | None:
        """Where a link leads now; None where it leads nowhere."""
        with contextlib.suppress(OSError, ValueError):
            found = self._reach()
            try:
                return path_of(found)
            finally:
                os.close(found)
        return None

    def _follow(self) -> tuple[int, str]:
        named = f"{self.what} is a link to {self.link!r:.200}"
        try:
            found = self._reach()
            try:
                where = self._judged(found, named)
                return self._readable(found), where
            finally:
                os.close(found)
        except FileNotFoundError:
            raise ValueError(f"{named}, which is not there: put the {self._kind} itself there") from None
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise ValueError(f"{named}, which leads in a circle: put the {self._kind} itself there") from None
            raise self._explained(error, f"{self.what}, a link to {self.link!r:.200},") from None

    def _reach(self) -> int:
        """A descriptor of what the link leads to; nothing is read, and no device or FIFO is opened."""
        if _O_PATH is not None:
            return os.open(self.path, _O_PATH | os.O_CLOEXEC, dir_fd=self.folder)
        mode = os.stat(self.path, dir_fd=self.folder).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise ValueError(f"{self.what} is a link to what is not a regular file")
        return os.open(self.path, _FLAGS, dir_fd=self.folder)

    def _readable(self, found: int) -> int:
        """The very file behind a descriptor, opened for reading."""
        return os.dup(found) if _O_PATH is None else os.open(f"/proc/self/fd/{found}", self._flags)

    def _judged(self, found: int, named: str) -> str:
        """Where a descriptor's file is. Raises ``ValueError`` where that is outside the roots, or no such file."""
        where = path_of(found)
        if where is None or not is_inside(where, _places_of(self.roots)):
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

    def _explained(self, error: OSError, what: str) -> Exception:
        """Why something is not opened, as an error to raise."""
        if error.errno in PASSING:
            return error
        if error.errno in _DENIED:
            return PermissionDenied(self._denied(what))
        if error.errno in _NO_FILE:
            return ValueError(f"{what} is not a regular file")
        return ValueError(f"{what} cannot be opened: {error.strerror}")

    def _denied(self, what: str) -> str:
        """Who may read it, who the server is, and the ways out."""
        if self._is_shut_in():
            return self._shut_in()
        found, user = "", os.geteuid()
        with contextlib.suppress(OSError):  # a folder above it may be closed as well
            status = os.stat(self.path, dir_fd=self.folder)
            found = f"its mode is {stat.S_IMODE(status.st_mode):04o} and its owner {status.st_uid}; "
        return (
            f"permission denied: {what} cannot be read ({found}the server runs as user {user}): chmod "
            f"{'a+rx' if self.folder is None else 'a+r'} it, chown it to user {user}, or run the server as its owner"
        )

    def _is_shut_in(self) -> bool:
        """Whether the folder that a file is in may be listed and not entered, as one of mode 0744 of another user."""
        if self.folder is None:
            return False
        try:
            os.stat(self.path, dir_fd=self.folder, follow_symlinks=False)
        except OSError as error:
            return error.errno in _DENIED
        return False

    def _shut_in(self) -> str:
        assert self.folder is not None
        status, user = os.fstat(self.folder), os.geteuid()
        return (
            f"permission denied: {self.what} cannot be reached, because its folder may not be entered (the folder's "
            f"mode is {stat.S_IMODE(status.st_mode):04o} and its owner {status.st_uid}; the server runs as user "
            f"{user}): chmod a+rx the folder, chown it to user {user}, or run the server as its owner"
        )


def path_of(descriptor: int) -> str | None:
    """Where an open file is, without links, as the system says; None where it does not say."""
    with contextlib.suppress(OSError):
        if _F_GETPATH is not None:
            return os.fsdecode(fcntl.fcntl(descriptor, _F_GETPATH, bytes(1024)).rstrip(b"\0"))
        return os.readlink(f"/proc/self/fd/{descriptor}")
    return None


def is_inside(path: str, folders: Iterable[str]) -> bool:
    return any(path == folder or path.startswith(f"{folder.rstrip('/')}/") for folder in folders)


def leads_inside(path: str | os.PathLike[str], roots: Sequence[Path]) -> bool:
    """Whether a link seems to lead into a root: enough to look at times, not to read."""
    where = os.path.realpath(path)
    return any(is_inside(where, [os.path.realpath(root)]) for root in roots)


def _places_of(roots: Sequence[Path]) -> Iterator[str]:
    """Where the roots are, without links; one that is not there is nowhere."""
    for root in roots:
        with contextlib.suppress(OSError):
            descriptor = os.open(root, _FLAGS | os.O_DIRECTORY)
            try:
                place = path_of(descriptor)
            finally:
                os.close(descriptor)
            if place is not None:
                yield place
