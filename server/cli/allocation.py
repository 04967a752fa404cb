"""Tuning of glibc's allocator, which must precede the import of torch."""

from __future__ import annotations

import ctypes
import os
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
"""The names of glibc's ``mallopt``, from malloc.h."""
_KEPT = 256 << 20
_LARGEST_IN_HEAP = 32 << 20


def keep_freed_memory() -> None:
    """Keep up to 256 MB of freed memory in the process, and put large tensors in huge pages.

    By default glibc maps and unmaps each large tensor, and the kernel zeroes its pages every time: half of the time of
    a long prompt. Other C libraries are left alone.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch reads it at its first allocation
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _LARGEST_IN_HEAP)
        mallopt(_TRIM_THRESHOLD, _KEPT)
        mallopt(_TOP_PAD, _LARGEST_IN_HEAP)
