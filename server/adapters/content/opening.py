"""Opens an adapter folder and its files, and says in a sentence why one is not opened.

Files are opened relative to the folder's descriptor, and judged by their own descriptor: what happens to a path
between the check and the read changes nothing.
"""

from __future__ import annotations

import errno
import os
import stat

PASSING = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EIO, errno.ESTALE, errno.EINTR})
"""Errors of the system that say nothing of the folder: it is to be read again."""

_DENIED = frozenset({errno.EACCES, errno.EPERM})
_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC


class PermissionDenied(ValueError):
    """A file or folder that is there, and that the server's user may not read."""


def open_folder(path: str | os.PathLike[str]) -> int:
    """A descriptor of the folder. Raises ``ValueError`` with a sentence, ``OSError`` where trying again may help."""
    try:
        return os.open(path, _FLAGS | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        raise _explained(error, "the folder", os.fspath(path), None) from None


def open_file(folder: int, name: str) -> int | None:
    """A descriptor of a regular file in the folder; None where there is none. Raises as ``open_folder``."""
    try:
        descriptor = os.open(name, _FLAGS | os.O_NOFOLLOW, dir_fd=folder)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _explained(error, name, name, folder) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{name} is not a regular file")
    return descriptor


def _explained(error: OSError, what: str, path: str, folder: int | None) -> Exception:
    """Why something is not opened, as an error to raise; ``path`` is relative to ``folder`` where there is one."""
    if error.errno in PASSING:
        return error
    if error.errno in _DENIED:
        return PermissionDenied(_denied(what, path, folder))
    if error.errno in (errno.ELOOP, errno.ENOTDIR) and _is_link(path, folder):
        return ValueError(f"{what} is a link, which is not followed: put the {_kind(folder)} itself there")
    if error.errno in (errno.ENXIO, errno.ENODEV, errno.EOPNOTSUPP):
        return ValueError(f"{what} is not a regular file")
    return ValueError(f"{what} cannot be opened: {error.strerror}")


def _denied(what: str, path: str, folder: int | None) -> str:
    """Who may read it, who the server is, and the ways out."""
    needed, found = ("a+r", "") if folder is not None else ("a+rx", "")
    try:
        status = os.stat(path, dir_fd=folder)
        found = f"its mode is {stat.S_IMODE(status.st_mode):04o} and its owner {status.st_uid}; "
    except OSError:
        pass  # a folder above it is closed as well
    user = os.geteuid()
    return (
        f"permission denied: {what} cannot be read ({found}the server runs as user {user}): "
        f"chmod {needed} it, chown it to user {user}, or run the server as its owner"
    )


def _is_link(path: str, folder: int | None) -> bool:
    try:
        return stat.S_ISLNK(os.stat(path, dir_fd=folder, follow_symlinks=False).st_mode)
    except OSError:
        return False


def _kind(folder: int | None) -> str:
    return "folder" if folder is None else "file"
