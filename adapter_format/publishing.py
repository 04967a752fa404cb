"""Publishing by one rename: a running server sees the whole adapter or none."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def published_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """A folder beside ``target`` to fill. It becomes ``target`` when the block succeeds, else it is deleted.

    ``replace`` allows a folder at ``target``, which is kept unless the new one takes its place.
    Raises ``OSError``, whose text names ``target``, for every error of the disk, also of safetensors in the block.
    """
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)  # left by a killed process with the same id
        if old.exists() and not target.exists():
            old.rename(target)  # killed between the two renames
        shutil.rmtree(old, ignore_errors=True)
        partial.mkdir()
        yield partial
        _settle(partial)
        _rename(partial, target, old if replace else None)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{target} cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _settle(folder: Path) -> None:
    """Give every file the default mode of new files (some libraries write private ones), and flush all to disk."""
    mode = folder.stat().st_mode & 0o666
    for path in sorted(folder.iterdir()):
        path.chmod(mode)
        _fsync(path)
    _fsync(folder)


def _rename(partial: Path, target: Path, old: Path | None) -> None:
    """Rename ``partial`` to ``target``. A folder at ``target`` is moved to ``old`` first, and back on any failure."""
    try:
        if old is not None and target.exists():
            target.rename(old)
        partial.rename(target)
    except BaseException:
        if old is not None and old.exists() and not target.exists():
            old.rename(target)
        raise
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)
    _fsync(target.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
