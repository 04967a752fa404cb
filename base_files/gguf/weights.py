"""Tensors of transformers made from a GGUF's: other order of rows, other offsets, two tensors joined."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from base_files.tensors import StoredTensor

Array = NDArray[Any]


@dataclass(frozen=True)
class DerivedTensor:
    """What ``transform`` makes of the rows of ``parts``. ``row_group`` rows belong together and are read at once."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[StoredTensor, ...]
    transform: Callable[..., Array]
    row_group: int = 1

    @property
    def dtype(self) -> str:
        return "/".join(sorted({part.dtype for part in self.parts}))

    @property
    def num_bytes(self) -> int:
        return sum(part.num_bytes for part in self.parts)

    def read(self, begin: int = 0, end: int | None = None) -> Array:
        """As ``StoredTensor.read``."""
        end = self.shape[0] if end is None else end
        first = begin // self.row_group * self.row_group
        last = -(-end // self.row_group) * self.row_group
        rows = self.transform(*(part.read(first, last) for part in self.parts))
        return rows[begin - first : end - first]


def renamed(name: str, tensor: StoredTensor) -> DerivedTensor:
    return DerivedTensor(name, tensor.shape, (tensor,), _same)


def with_rotation_halves_apart(name: str, tensor: StoredTensor, head_dim: int) -> DerivedTensor:
    """Rows of q or k as transformers has them: first all first halves of a head's rotations, then all second ones.

    llama.cpp stores the two rows of a rotation next to each other.
    """

    def transform(rows: Array) -> Array:
        pairs = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
        return pairs.swapaxes(1, 2).reshape(rows.shape)

    return DerivedTensor(name, tensor.shape, (tensor,), transform, row_group=head_dim)


def minus_one(name: str, tensor: StoredTensor) -> DerivedTensor:
    """A norm's weight to which transformers' modelling code adds 1, and which llama.cpp stores with the 1."""
    return DerivedTensor(name, tensor.shape, (tensor,), _minus_one)


def experts_joined(name: str, gate: StoredTensor, up: StoredTensor) -> DerivedTensor:
    """[experts, 2 * width, hidden]: all rows of the gate, then all rows of up."""
    experts, width, hidden = gate.shape
    return DerivedTensor(name, (experts, 2 * width, hidden), (gate, up), _joined)


def experts_transposed(name: str, tensor: StoredTensor) -> DerivedTensor:
    """[experts, inputs, outputs]."""
    experts, outputs, inputs = tensor.shape
    return DerivedTensor(name, (experts, inputs, outputs), (tensor,), _transposed)


def experts_interleaved(name: str, gate: StoredTensor, up: StoredTensor) -> DerivedTensor:
    """[experts, hidden, 2 * width], or [experts, 2 * width] of two biases: gate and up take turns in the last axis."""
    experts, width, *inputs = gate.shape
    return DerivedTensor(name, (experts, *inputs, 2 * width), (gate, up), _interleaved)


def _same(rows: Array) -> Array:
    return rows


def _minus_one(rows: Array) -> Array:
    result: Array = rows - np.float32(1)
    return result


def _joined(gate: Array, up: Array) -> Array:
    return np.concatenate([gate, up], axis=1)


def _transposed(rows: Array) -> Array:
    return rows.swapaxes(1, 2)


def _interleaved(gate: Array, up: Array) -> Array:
    pairs = np.stack([gate, up], axis=2)  # [experts, width, 2] and, of weights, [experts, width, 2, hidden]
    rows = pairs.reshape(pairs.shape[0], -1, *pairs.shape[3:])
    return rows.swapaxes(1, 2) if rows.ndim == 3 else rows
