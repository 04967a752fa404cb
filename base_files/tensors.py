"""A tensor in a weight file, read row by row, so that a base larger than memory can be quantized."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from base_files.safetensors_header import DTYPE_BYTES, TensorEntry


class StoredTensor(Protocol):
    """A tensor under its name in transformers, in whatever format its file has.

    ``shape`` has the outermost dimension first. ``dtype`` names the format: ``"F32"``, ``"BF16"``, ``"Q4_K"``,
    ``"MXFP4"``. ``num_bytes`` is what it takes in the file.
    """

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> str: ...

    @property
    def num_bytes(self) -> int: ...

    def read(self, begin: int = 0, end: int | None = None) -> NDArray[Any]:
        """Rows ``[begin, end)`` of the outermost dimension, dequantized: float32 [end - begin, *shape[1:]].

        Raises ``ValueError`` with a sentence where the file is malformed, or ``OSError``.
        """


@dataclass(frozen=True)
class SafetensorsTensor:
    """A tensor of floats in a safetensors file."""

    path: Path
    entry: TensorEntry

    @property
    def name(self) -> str:
        return self.entry.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entry.shape

    @property
    def dtype(self) -> str:
        return self.entry.dtype

    @property
    def num_bytes(self) -> int:
        return self.entry.end - self.entry.begin

    def read(self, begin: int = 0, end: int | None = None) -> NDArray[Any]:
        """As ``StoredTensor.read``; a type that is no float raises ``ValueError``."""
        if self.dtype not in _TO_FLOAT32:
            raise ValueError(f"tensor {self.name} is of type {self.dtype}; {', '.join(_TO_FLOAT32)} are read")
        end = (self.shape[0] if self.shape else 1) if end is None else end
        shape = (end - begin, *self.shape[1:]) if self.shape else ()
        return _TO_FLOAT32[self.dtype](self.read_bytes(begin, end)).reshape(shape)

    def read_bytes(self, begin: int = 0, end: int | None = None) -> bytes:
        """The bytes of rows ``[begin, end)`` as they are in the file. Raises as ``read``."""
        num_rows = self.shape[0] if self.shape else 1
        end = num_rows if end is None else end
        row = math.prod(self.shape[1:]) * DTYPE_BYTES[self.dtype]
        with self.path.open("rb") as file:
            file.seek(self.entry.begin + begin * row)
            data = file.read((end - begin) * row)
        if len(data) != (end - begin) * row:
            raise ValueError(f"{self.path.name} is cut off in {self.name}")
        return data


def bfloat16_to_float32(data: bytes) -> NDArray[Any]:
    return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")


_TO_FLOAT32 = {
    "F32": lambda data: np.frombuffer(data, "<f4"),
    "F16": lambda data: np.frombuffer(data, "<f2").astype("<f4"),
    "BF16": bfloat16_to_float32,
}
FLOAT_TYPES = frozenset(_TO_FLOAT32)
"""The types of tensors that are read as floats."""
