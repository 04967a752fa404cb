"""Memory that is a mapping of a weights file, and can be given back because it can be read again."""

from __future__ import annotations

import ctypes
import mmap
import sys
from pathlib import Path

import torch


class MappedFiles:
    """Where the weights files of this process are mapped (Linux tells; elsewhere there is nothing to give back)."""

    def __init__(self) -> None:
        try:
            lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
        except OSError:
            lines = []
        spans = [line.split(maxsplit=1)[0].split("-") for line in lines if line.endswith(".safetensors")]
        self._spans = [(int(begin, 16), int(end, 16)) for begin, end in spans]

    def give_back(self, tensor: torch.Tensor) -> None:
        """Let the system have the pages of a tensor in a mapped file; other tensors keep theirs.

        The mapping is private and never written, so that whoever reads it again gets the file's bytes.
        """
        begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        if not tensor.is_contiguous() or not any(low <= begin and end <= high for low, high in self._spans):
            return
        begin += -begin % mmap.PAGESIZE
        end -= end % mmap.PAGESIZE
        if begin < end:
            libc = ctypes.CDLL(None)
            libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)


def trim() -> None:
    """Let the system have what was freed: the C library (glibc) keeps it, a tenth of a base while its weights turn."""
    trim_heap = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim_heap is not None:
        trim_heap(0)
