"""A new adapter folder, put among the others by one rename: a running server sees the whole adapter or none."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from server.adapters.names import is_name
from server.metrics import BASE
from server.settings import Settings


class NotPublished(Exception):
    """There is no new adapter, and nothing was left behind; the text is for the person at the terminal."""


def choose_target(settings: Settings, name: str, *, replace: bool = False) -> Path:
    """The folder that an adapter of this name gets. Raises ``NotPublished`` where it may not have it."""
    if not is_name(name):
        raise NotPublished(
            f"{name!r} is no adapter name: choose one with --name, of letters, digits, '.', '_' and '-', 128 at most, "
            "beginning with a letter or digit"
        )
    if name in (BASE, settings.base_name):
        raise NotPublished(f"the name {name} means the base model: choose another with --name")
    target = settings.adapters_dir / name
    if not os.path.lexists(target):
        return target
    if not replace:
        raise NotPublished(f"{target} exists already: choose another --name")
    if target.is_symlink() or not target.is_dir():
        raise NotPublished(f"{target} is no folder of its own, so it is not replaced: remove it first")
    return target


@contextmanager
def published_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """A folder beside ``target`` to fill; it takes its place when the block ends well, and vanishes otherwise.

    Raises ``NotPublished`` where the disk does not allow it; what stood at ``target`` is there afterwards.
    """
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)  # of a process of the same number, killed before
        partial.mkdir()
        yield partial
        _settle(partial)
        _rename(partial, target, replace=replace)
    except OSError as error:
        raise NotPublished(f"{target} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _settle(folder: Path) -> None:
    """Give every file the mode that new files have here (some libraries' are private), and wait for the disk."""
    mode = folder.stat().st_mode & 0o666
    for path in sorted(folder.iterdir()):
        path.chmod(mode)
        _fsync(path)
    _fsync(folder)


def _rename(partial: Path, target: Path, *, replace: bool) -> None:
    """Rename ``partial`` to ``target``. What stood there is moved aside first, and moved back if that fails."""
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    shutil.rmtree(old, ignore_errors=True)
    if replace and target.exists():
        target.rename(old)
    try:
        partial.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
    _fsync(target.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
