"""Releases memory of mapped weight files, whose pages can be read again from the file."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from base_files.deferred_weights import row_slices

_MAPS = Path("/proc/self/maps")


class MappedFiles:
    """``ReadableWeights`` of safetensors: their address ranges in this process, on Linux.

    Elsewhere nothing is released.

    A mapping belongs to a file if device and inode are equal, or the resolved path. Both are needed: on btrfs and
    overlayfs the device of a mapping differs from that of ``stat``, and a file may have been renamed since.
    """

    def __init__(self, paths: Iterable[Path], *, maps: Path = _MAPS) -> None:
        inodes, names = set(), set()
        for path in paths:
            status = path.stat()
            inodes.add((os.major(status.st_dev), os.minor(status.st_dev), status.st_ino))
            names.add(str(path.resolve()).replace("\n", "\\012"))  # as the system writes a line break
        self._spans = [(begin, end) for begin, end, inode, name in _mappings(maps) if inode in inodes or name in names]

    def one_pass(self, what: str) -> AbstractContextManager[object]:
        """Tells nothing: pages are read faster than they are quantized."""
        return nullcontext()

    def hold(self, weight: torch.Tensor) -> None:
        """Nothing: the system reads what is touched."""

    def pieces(self, weight: torch.Tensor) -> Iterator[torch.Tensor]:
        """As ``ReadableWeights.pieces``."""
        for rows in row_slices(weight):
            yield weight[rows]
            self.release(weight[rows])

    def release(self, tensor: torch.Tensor) -> None:
        """Release the pages of a tensor in a mapped file; other tensors are ignored.

        The mapping is private and never written, so that a later read returns the file's bytes.
        """
        begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        if not tensor.is_contiguous() or not any(low <= begin and end <= high for low, high in self._spans):
            return
        begin += -begin % mmap.PAGESIZE
        end -= end % mmap.PAGESIZE
        if begin < end:
            libc = ctypes.CDLL(None)
            libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)


def _mappings(maps: Path) -> Iterator[tuple[int, int, tuple[int, int, int], str]]:
    """Start, end, (major, minor, inode) and path of every file mapping, from proc_pid_maps(5)."""
    try:
        lines = maps.read_text(encoding="utf-8", errors="surrogateescape").split("\n")
    except OSError:
        return
    for line in lines:
        parts = line.split(maxsplit=5)
        if len(parts) < 6 or not parts[5].startswith("/"):
            continue
        (begin, end), (major, minor) = parts[0].split("-"), parts[3].split(":")
        yield int(begin, 16), int(end, 16), (int(major, 16), int(minor, 16), int(parts[4])), parts[5]


def trim() -> None:
    """Return freed memory to the system; glibc would keep it, a tenth of a base during quantization."""
    trim_heap = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim_heap is not None:
        trim_heap(0)
