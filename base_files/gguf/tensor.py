"""A tensor in a GGUF file, read by rows of its outermost dimension."""

from __future__ import annotations

import math
import os
import stat
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from base_files.gguf.blocks import BlockType, dequantize

READ_BYTES = 1 << 20


@dataclass(frozen=True)
class GGUFTensor:
    """``shape`` has the outermost dimension first; its bytes are ``[begin, end)`` of the file. A ``StoredTensor``."""

    path: Path
    name: str
    shape: tuple[int, ...]
    block_type: BlockType
    begin: int
    end: int

    @property
    def dtype(self) -> str:
        return self.block_type.name

    @property
    def num_bytes(self) -> int:
        return self.end - self.begin

    def read(self, begin: int = 0, end: int | None = None) -> NDArray[Any]:
        """As ``StoredTensor.read``. Memory: the result, and the blocks of a few thousand elements."""
        end = self.shape[0] if end is None else end
        row = math.prod(self.shape[1:])
        elements = self.block_type.elements
        first, last = begin * row // elements, -(-end * row // elements)
        values = np.empty((last - first) * elements, np.float32)
        with open_regular(self.path) as file:
            file.seek(self.begin + first * self.block_type.num_bytes)
            self._fill(values, file)
        inside = values[begin * row - first * elements :][: (end - begin) * row]
        return inside.reshape(end - begin, *self.shape[1:])

    def _fill(self, values: NDArray[np.float32], file: BufferedReader) -> None:
        elements, num_bytes = self.block_type.elements, self.block_type.num_bytes
        step = READ_BYTES // num_bytes * elements
        buffer = memoryview(bytearray(min(step, len(values)) // elements * num_bytes))
        for begin in range(0, len(values), step):
            piece = values[begin : begin + step]
            data = buffer[: len(piece) // elements * num_bytes]
            if file.readinto(data) != len(data):
                raise ValueError(f"{self.path.name} became shorter while it was read")
            dequantize(self.block_type, data, piece)


def open_regular(path: Path) -> BufferedReader:
    """Open a file to read it, without waiting for a pipe or a device. Raises ``ValueError`` or ``OSError``."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{path.name} is not a regular file")
    return open(descriptor, "rb")
