"""Tensors that end where an unmapped page begins: a kernel that reads or writes behind one ends the process."""

from __future__ import annotations

import ctypes
import mmap

import torch

_PROT_NONE = 0


def guarded(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy of a tensor, aligned to no more than its numbers."""
    if not tensor.numel():
        return tensor.clone()
    num_pages = -(-tensor.nbytes // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (num_pages + 1) * mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    if protect(address + num_pages * mmap.PAGESIZE, mmap.PAGESIZE, _PROT_NONE):
        raise OSError(ctypes.get_errno(), "mprotect")
    offset = num_pages * mmap.PAGESIZE - tensor.nbytes
    flat = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
    return flat.view(tensor.shape).copy_(tensor)
