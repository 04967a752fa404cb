"""Loads the library of C kernels, and finds the code of a kernel for an instruction set (a tier) of this CPU."""

from __future__ import annotations

import ctypes
import fcntl
import logging
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from cpu_kernels.build import LIBRARIES, BuildFailed, build, built_library
from cpu_kernels.tiers import LOWER

logger = logging.getLogger("quickchange.model")
_loading = threading.Lock()


class LibraryRefused(Exception):
    """A library that does not have what these modules call."""


class _Kernel(ctypes.Structure):
    """``struct kernel`` of ``kernel.h``; the array of tiers is read behind it."""

    _fields_ = (("name", ctypes.c_char_p), ("fields", ctypes.c_char_p), ("record_size", ctypes.c_int64))


@dataclass(frozen=True)
class KernelEntry:
    """A kernel of the library: the fields of its record as (type, name), and its code's address by tier."""

    fields: Sequence[tuple[str, str]]
    code: Mapping[str, int]

    def code_for(self, tier: str) -> tuple[str, int] | None:
        """The tier's code, or that of the next lower tier that has some; None where no tier has."""
        for name in (tier, *LOWER[tier]):
            if name in self.code:
                return name, self.code[name]
        return None


class Library:
    """The library at ``path``. Raises ``OSError`` where it does not load, ``LibraryRefused`` where it is another."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._library = ctypes.CDLL(str(path))
        self.compiler = self._text("quickchange_compiler")
        tiers = self._text("quickchange_tier_names").split()
        if set(tiers) != set(LOWER):
            raise LibraryRefused(f"{path} has the instruction sets {', '.join(tiers)}")
        self.kernels = dict(self._table(tiers))

    def function(self, name: str) -> int:
        """The address of a function."""
        return self._address(name)

    def _address(self, name: str) -> int:
        try:
            return ctypes.addressof(ctypes.c_char.in_dll(self._library, name))
        except ValueError:
            raise LibraryRefused(f"{self.path} has no '{name}'") from None

    def _text(self, name: str) -> str:
        return ctypes.string_at(self._address(name)).decode()

    def _table(self, tiers: Sequence[str]) -> Iterator[tuple[str, KernelEntry]]:
        start = self._address("quickchange_kernels")
        size = ctypes.sizeof(_Kernel) + 8 * len(tiers)
        while (kernel := _Kernel.from_address(start)).name:
            name = kernel.name.decode()
            fields = [tuple(field.split("|")) for field in kernel.fields.decode().split(";") if field]
            addresses = (ctypes.c_int64 * len(tiers)).from_address(start + ctypes.sizeof(_Kernel))
            code = {tier: address for tier, address in zip(tiers, addresses, strict=True) if address}
            if kernel.record_size != 8 * len(fields) or not code:
                raise LibraryRefused(f"{self.path}: the entry of '{name}' is damaged")
            yield name, KernelEntry([(kind, field) for kind, field in fields], code)
            start += size


def library() -> Library | None:
    """The library of these sources, built now where it is missing; None, after one warning, where it cannot be."""
    with _loading:
        return _library()


@cache
def _library() -> Library | None:
    try:
        return Library(built_library() or _built_now())
    except (BuildFailed, LibraryRefused, OSError) as error:
        logger.warning("there are no C kernels, so PyTorch's slower operations are used: %s", error)
        return None


def _built_now() -> Path:
    with _exclusive(LIBRARIES):
        path = built_library()  # another process may have built it meanwhile
        if path is None:
            logger.info("compiling the C kernels, once: this takes some seconds")
            path = build()
        return path


@contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Let one process at a time build in a folder. Raises ``BuildFailed`` where it cannot be written."""
    try:
        folder.mkdir(exist_ok=True)
        lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise BuildFailed(
            f"{folder} has no library of these sources and cannot be written ({error.strerror}): run "
            "'python -m cpu_kernels.build' as a user who may write there, or install the package again"
        ) from error
    try:
        with suppress(OSError):  # a file system without locks: two processes then build the same file
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_UN)  # closing keeps it where a forked process has a copy
        os.close(lock)
