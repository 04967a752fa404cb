"""Products of integers by routines compiled for this CPU: all between a linear's input and its result is one call.

Three times as fast as torch's at one row, and in long prompts half again: torch's kernels need the activations put on
the grid before and scaled after, each in passes of its own.
"""

from __future__ import annotations

import threading
from functools import cache
from typing import Any, ClassVar

import torch

from cpu_kernels.blocks import (
    BLOCK,
    BY_GELU,
    BY_SILU,
    FEW,
    NO_GATING,
    ROW_BLOCK,
    by_blocks,
    in_blocks,
    out_of_blocks,
    padded,
    sums_size,
)
from cpu_kernels.routine import Routine, available
from server.quantization.outliers import Outliers
from server.quantization.rows import LEVELS, Int8Rows, pieces

_ZERO = LEVELS + 1
_memory = threading.local()


class NativeKernel:
    """A weight packed in blocks. Subclasses say by which instructions it is multiplied."""

    name: ClassVar[str]
    routine: ClassVar[Routine]
    adds_deltas: ClassVar[bool] = False
    """Whether it adds what ``deltas`` are the addresses of: see ``runs`` and ``parts`` of the routine."""

    def __init__(self, rows: Int8Rows, bias: torch.Tensor | None = None, outliers: Outliers | None = None) -> None:
        self.num_outputs, self.num_inputs = rows.integers.shape
        self._weights = in_blocks(rows.integers)
        self._width = 4 * self._weights.shape[1]
        self._row_scales = rows.scales
        self._constants = _constants(rows, bias)
        self._outliers = outliers
        weights = torch.empty(0, self.num_outputs) if outliers is None else outliers.weights
        self._outlier_weights = by_blocks(weights).transpose(0, 1).contiguous()
        self._fixed = self._addresses()

    def __call__(self, x: torch.Tensor, deltas: tuple[int, int] = (0, 0)) -> torch.Tensor:
        """float32 [..., in] -> a new float32 [..., out]."""
        return self._multiply(x, self.num_outputs, NO_GATING, deltas)

    def gated(self, x: torch.Tensor, deltas: tuple[int, int] = (0, 0), *, by_gelu: bool = False) -> torch.Tensor:
        """float32 [..., in] -> [..., out / 2]: silu, or gelu, of the first half of the outputs, times the second.

        Of many rows it is in memory that the next call on this thread writes over.
        """
        num_units, num_rows = self.num_outputs // 2, x.numel() // self.num_inputs
        memory = _workspace("units", num_rows, 4 * num_rows * num_units)
        y = memory.view(torch.float32).view(*x.shape[:-1], num_units)
        return self._multiply(x, num_units, BY_GELU if by_gelu else BY_SILU, deltas, y)

    @property
    def can_gate(self) -> bool:
        """Whether both halves of the outputs are whole parts of blocks."""
        return self.num_outputs % BLOCK == 0

    def in_floats(self) -> torch.Tensor:
        """The weight it multiplies with, float32 [out, in]."""
        integers = out_of_blocks(self._weights, self.num_outputs, self.num_inputs)
        weight = integers * self._row_scales[:, None]
        return weight if self._outliers is None else self._outliers.put_into(weight)

    def _multiply(
        self, x: torch.Tensor, num_outputs: int, gating: int, deltas: tuple[int, int], y: torch.Tensor | None = None
    ) -> torch.Tensor:
        if not x.is_contiguous():
            x = x.contiguous()
        num_rows = x.numel() // self.num_inputs
        num_padded = padded(num_rows, ROW_BLOCK)
        sums = sums_size(num_rows, self._width, len(self._weights))
        num_apart = 0 if self._outliers is None else len(self._outliers.indices)
        scratch = _workspace("scratch", num_rows, sums + num_padded * (self._width + 4 + 4 * num_apart))
        y = torch.empty(*x.shape[:-1], num_outputs) if y is None else y
        grid = scratch.data_ptr() + sums
        largest = grid + num_padded * self._width
        self.routine(
            torch.get_num_threads(), x.data_ptr(), num_rows, y.data_ptr(), gating, grid, largest,
            largest + 4 * num_padded, scratch.data_ptr(), *self._fixed, *deltas,
        )  # fmt: skip
        return y

    def _addresses(self) -> tuple[int, ...]:
        """What stays the same from call to call, in the order of the routine's fields."""
        outliers = self._outliers
        apart = (0, 0, 0, 0)
        if outliers is not None:
            mask, indices, weights = outliers.others, outliers.indices, self._outlier_weights
            apart = (mask.data_ptr(), len(indices), indices.data_ptr(), weights.data_ptr())
        sizes = (self.num_inputs, self.num_outputs, self._width, len(self._weights))
        return *sizes, self._weights.data_ptr(), self._constants.data_ptr(), *apart


def _workspace(name: str, num_rows: int, num_bytes: int) -> torch.Tensor:
    """uint8 [num_bytes] for the time of a call.

    Of many rows it is the same memory again and again, which stays in the caches: fresh memory of tens of megabytes for
    each layer takes half as long again as the products. What a tape records has to be memory of its own.
    """
    if num_rows <= FEW or Routine.recorder is not None:
        return torch.empty(num_bytes, dtype=torch.uint8)
    kept: torch.Tensor | None = getattr(_memory, name, None)
    if kept is None or len(kept) < num_bytes:
        kept = torch.empty(num_bytes, dtype=torch.uint8)
        setattr(_memory, name, kept)
    return kept[:num_bytes]


@cache
def native_kernels() -> dict[str, type[NativeKernel]]:
    """Those that this machine can run, by name, fastest first."""
    if not available():
        return {}
    from cpu_kernels.product import products

    named: dict[str, Any] = {}
    for name, routine in products().items():
        members = {"name": name, "routine": routine, "adds_deltas": name == "AMX"}
        named[name] = type("NativeKernel", (NativeKernel,), members)
    return named


def _constants(rows: Int8Rows, bias: torch.Tensor | None) -> torch.Tensor:
    """What the sums of each block are finished with, int32 [blocks, 3, 32]: zeros, and the bits of scales and bias."""
    # in pieces, as torch has a whole copy in int32 to sum up
    zeros = torch.cat([piece.sum(1, dtype=torch.int32) for piece in pieces(rows.integers)]) * -_ZERO
    bias = torch.zeros(len(zeros)) if bias is None else bias.contiguous()
    scales = rows.scales * (1.0 / LEVELS)
    found = torch.stack([zeros, scales.view(torch.int32), bias.view(torch.int32)])
    return by_blocks(found).transpose(0, 1).contiguous()
