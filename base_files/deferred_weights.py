"""A model whose weights are read from the base's files when they are needed, and released when they are not.

Quantization needs each weight for a moment. Weights of a safetensors file are mapped: the system reads a page when it
is touched and can drop it again. Quantized formats have no floats in the file to map, so here every weight is a float32
tensor in an anonymous mapping of its own: ``hold`` dequantizes rows into it, ``release`` gives its pages back. A part
that nobody has asked for is zeros.
"""

from __future__ import annotations

import math
import mmap
import sys
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import Protocol

import torch

from base_files.errors import BaseMalformed
from base_files.load_progress import LoadProgress
from base_files.tensors import StoredTensor

PIECE_NUMBERS = 1 << 19
"""Numbers that are read at a time: a core's cache holds them in float32."""


class ReadableWeights(Protocol):
    """Weights of a model in memory that holds them only while they are needed. Tensors are parameters or rows of one.

    Of a weight with three dimensions a row is one expert: ``hold(weight[number])`` reads it, ``release`` frees it.
    """

    def one_pass(self, what: str) -> AbstractContextManager[object]:
        """A pass over the weights, whose progress is told as that of ``what``."""

    def hold(self, weight: torch.Tensor) -> None:
        """Make the numbers of a weight, or of some of its rows, readable until they are released."""

    def pieces(self, weight: torch.Tensor) -> Iterator[torch.Tensor]:
        """Slices of a weight's rows, one after another; each is readable until the next. What is held stays held.

        Of a weight with three dimensions each is one expert. A slice may be a tensor of its own.
        """

    def release(self, weight: torch.Tensor) -> None:
        """Free the memory of a weight or of some of its rows. Other tensors are ignored."""


def row_slices(weight: torch.Tensor) -> Iterator[slice]:
    """Rows of at most ``PIECE_NUMBERS`` numbers, or one row."""
    step = max(1, PIECE_NUMBERS // max(1, weight[:1].numel()))
    for begin in range(0, len(weight), step):
        yield slice(begin, min(begin + step, len(weight)))


def read_rows(tensor: StoredTensor, begin: int, end: int) -> torch.Tensor:
    """Rows ``[begin, end)`` of the outermost dimension, float32."""
    rows = tensor.read(begin, end)
    return torch.from_numpy(rows if rows.flags.writeable else rows.copy())


def read_into(weight: torch.Tensor, tensor: StoredTensor, progress: LoadProgress) -> None:
    """Fill a weight of any float dtype, block by block."""
    for rows in row_slices(weight):
        weight[rows] = read_rows(tensor, rows.start, rows.stop)
        progress.add(weight[rows].numel())


@dataclass
class _Place:
    """Where a tensor of the files has its memory; ``held`` [rows] tells which rows are in it."""

    tensor: StoredTensor
    memory: mmap.mmap
    weight: torch.Tensor
    held: torch.Tensor


def _anonymous_memory(num_bytes: int) -> mmap.mmap:
    """Zeros that take no memory until they are written; of a shared mapping, Python's default, none could be freed."""
    if sys.platform == "win32":
        return mmap.mmap(-1, num_bytes)
    return mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


class DeferredWeights:
    """``ReadableWeights`` of the base ``name``, dequantized when they are asked for. Raises ``BaseMalformed`` then."""

    def __init__(self, name: str, progress: LoadProgress) -> None:
        self._name, self._progress = name, progress
        self._places: list[_Place] = []
        self._addresses: list[int] = []

    def place(self, tensor: StoredTensor, *, by_row: bool = False) -> torch.Tensor:
        """A float32 tensor for a tensor of the files, of which no row is in memory yet.

        Of a large one, pages of 2 MiB are written three times as fast; ``by_row`` is for an embedding, of which they
        would take 2 MiB for each row.
        """
        memory = _anonymous_memory(4 * math.prod(tensor.shape))
        if sys.platform == "linux":
            with suppress(OSError):  # of a kernel without huge pages
                memory.madvise(mmap.MADV_NOHUGEPAGE if by_row else mmap.MADV_HUGEPAGE)
        weight = torch.frombuffer(memory, dtype=torch.float32).view(tensor.shape)
        index = bisect_right(self._addresses, weight.data_ptr())
        self._addresses.insert(index, weight.data_ptr())
        self._places.insert(index, _Place(tensor, memory, weight, torch.zeros(len(weight), dtype=torch.bool)))
        return weight

    def one_pass(self, what: str) -> AbstractContextManager[object]:
        self._progress.start(what)
        return self._progress

    def hold(self, weight: torch.Tensor) -> None:
        place, rows = self._find(weight)
        if place is None:
            return
        for part in row_slices(place.weight[rows]):
            begin, end = rows.start + part.start, rows.start + part.stop
            if not place.held[begin:end].all():
                place.weight[begin:end] = self._read(place.tensor, begin, end)
                place.held[begin:end] = True

    def pieces(self, weight: torch.Tensor) -> Iterator[torch.Tensor]:
        for part in row_slices(weight):
            piece = weight[part]
            place, rows = self._find(piece)
            if place is None or place.held[rows].all():
                yield piece
            else:
                yield self._read(place.tensor, rows.start, rows.stop)

    def release(self, weight: torch.Tensor) -> None:
        place, rows = self._find(weight)
        if place is None:
            return
        place.held[rows] = False
        row_bytes = place.weight[:1].nbytes
        begin = -(-rows.start * row_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        end = rows.stop * row_bytes // mmap.PAGESIZE * mmap.PAGESIZE
        if rows.stop == len(place.weight):
            end = len(place.memory)
        if begin < end and sys.platform == "linux":
            place.memory.madvise(mmap.MADV_DONTNEED, begin, end - begin)

    def _read(self, tensor: StoredTensor, begin: int, end: int) -> torch.Tensor:
        try:
            rows = read_rows(tensor, begin, end)
        except (OSError, ValueError) as error:
            raise BaseMalformed(self._name, str(error)) from error
        self._progress.add(rows.numel())
        return rows

    def _find(self, weight: torch.Tensor) -> tuple[_Place | None, slice]:
        """The place that holds a weight, and its rows there; none for a tensor that is not made of whole rows."""
        if not weight.is_contiguous():
            return None, slice(0, 0)
        index = bisect_right(self._addresses, weight.data_ptr()) - 1
        place = self._places[index] if index >= 0 else None
        if place is None or weight.data_ptr() >= place.weight.data_ptr() + place.weight.nbytes:
            return None, slice(0, 0)
        row_bytes = place.weight[:1].nbytes
        begin, remainder = divmod(weight.data_ptr() - place.weight.data_ptr(), row_bytes)
        assert remainder == 0 and weight.nbytes % row_bytes == 0, "only whole rows can be read"
        return place, slice(begin, begin + weight.nbytes // row_bytes)
