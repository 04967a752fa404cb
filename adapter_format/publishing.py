"""Publishing by one rename: a running server sees the whole adapter or none."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def published_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """A folder beside ``target`` to fill; it takes its place when the block ends well, and vanishes otherwise.

    Raises ``OSError`` where the disk does not allow it; what stood at ``target`` is there afterwards.
    """
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)  # of a process of the same number, killed before
        partial.mkdir()
        yield partial
        _settle(partial)
        _rename(partial, target, replace=replace)
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
    """Where ``replace`` is set, what stood at ``target`` is moved aside first, and moved back if the rename fails."""
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
