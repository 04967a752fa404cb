"""How this process gets memory from the system, which is to be settled before torch is imported."""

from __future__ import annotations

import ctypes
import os
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
"""The names of glibc's ``mallopt``, from malloc.h."""
_KEPT = 256 << 20
_LARGEST_IN_HEAP = 32 << 20


def keep_freed_memory() -> None:
    """Let what is freed stay with the process, up to 256 MB of it, and large tensors lie in large pages.

    By default the C library takes and gives back the memory of every large tensor, and the system clears each of its
    pages anew: half of the time of a long prompt. Other C libraries than glibc stay as they are.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch reads it when it allocates first
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _LARGEST_IN_HEAP)
        mallopt(_TRIM_THRESHOLD, _KEPT)
        mallopt(_TOP_PAD, _LARGEST_IN_HEAP)
