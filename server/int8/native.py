"""Products of integers by routines compiled for this CPU: all between a linear's input and its result is one call.

Three times as fast as torch's at one row, and in long prompts half again: torch's kernels need the activations put on
the grid before and scaled after, each in passes of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar

import torch

from server.int8.outliers import Outliers
from server.int8.rows import LEVELS, Int8Rows, pieces
from server.native.routine import Routine, available

_ROW_BLOCK = 32
_BLOCK = 32
_ZERO = LEVELS + 1


class NativeKernel:
    """A weight packed in blocks. Subclasses say by which instructions it is multiplied."""

    name: ClassVar[str]
    routine: ClassVar[Routine]
    _sums_size: ClassVar[Callable[[int, int, int], int]]

    def __init__(self, rows: Int8Rows, bias: torch.Tensor | None = None, outliers: Outliers | None = None) -> None:
        self.num_outputs, self.num_inputs = rows.integers.shape
        self._weights = _in_blocks(rows.integers)
        self._width = 4 * self._weights.shape[1]
        self._row_scales = rows.scales
        self._constants = _constants(rows, bias)
        self._outliers = outliers
        self._fixed = self._addresses()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """float32 [..., in] -> a new float32 [..., out]."""
        if not x.is_contiguous():
            x = x.contiguous()
        num_rows = x.numel() // self.num_inputs
        padded = -(-num_rows // _ROW_BLOCK) * _ROW_BLOCK
        sums = self._sums_size(num_rows, self._width, len(self._weights))
        scratch = torch.empty(sums + padded * (self._width + 4), dtype=torch.uint8)
        y = torch.empty(*x.shape[:-1], self.num_outputs)
        grid = scratch.data_ptr() + sums
        self.routine(
            torch.get_num_threads(), x.data_ptr(), num_rows, y.data_ptr(), grid, grid + padded * self._width,
            scratch.data_ptr(), *self._fixed,
        )  # fmt: skip
        return y

    def in_floats(self) -> torch.Tensor:
        """The weight it multiplies with, float32 [out, in]."""
        blocks = self._weights.permute(0, 2, 1, 3).reshape(-1, self._width)
        weight = blocks[: self.num_outputs, : self.num_inputs] * self._row_scales[:, None]
        return weight if self._outliers is None else self._outliers.put_into(weight)

    def _addresses(self) -> tuple[int, ...]:
        """What stays the same from call to call, in the order of the routine's fields."""
        outliers = self._outliers
        apart = (0, 0, 0, 0)
        if outliers is not None:
            mask, indices, weights = outliers.others, outliers.indices, outliers.weights
            apart = (mask.data_ptr(), len(indices), indices.data_ptr(), weights.data_ptr())
        sizes = (self.num_inputs, self.num_outputs, self._width, len(self._weights))
        return *sizes, self._weights.data_ptr(), self._constants.data_ptr(), *apart


@cache
def native_kernels() -> dict[str, type[NativeKernel]]:
    """Those that this machine can run, by name, fastest first."""
    if not available():
        return {}
    from server.native.product import products, sums_size

    named: dict[str, Any] = {}
    for name, routine in products().items():
        named[name] = type("NativeKernel", (NativeKernel,), {"name": name, "routine": routine, "_sums_size": staticmethod(sums_size)})
    return named


def _in_blocks(integers: torch.Tensor) -> torch.Tensor:
    """int8 [out, in] -> [blocks, in / 4, 32, 4], outputs padded with zeros to multiples of 32 and inputs to 64."""
    num_outputs, num_inputs = integers.shape
    blocks, steps = -(-num_outputs // _BLOCK), 16 * -(-num_inputs // 64)
    packed = torch.empty(blocks, steps, _BLOCK, 4, dtype=torch.int8)
    for number, block in enumerate(integers.split(_BLOCK)):
        whole = torch.zeros(_BLOCK, steps * 4, dtype=torch.int8)
        whole[: len(block), :num_inputs] = block
        packed[number] = whole.view(_BLOCK, steps, 4).transpose(0, 1)
    return packed


def _constants(rows: Int8Rows, bias: torch.Tensor | None) -> torch.Tensor:
    """What the sums of each block are finished with, int32 [blocks, 3, 32]: zeros, and the bits of scales and bias."""
    num_outputs = len(rows.integers)
    found = torch.zeros(3, -(-num_outputs // _BLOCK) * _BLOCK, dtype=torch.int32)
    # in pieces, as torch has a whole copy in int32 to sum up
    found[0, :num_outputs] = torch.cat([piece.sum(1, dtype=torch.int32) for piece in pieces(rows.integers)]) * -_ZERO
    found[1, :num_outputs] = (rows.scales * (1.0 / LEVELS)).view(torch.int32)
    if bias is not None:
        found[2, :num_outputs] = bias.contiguous().view(torch.int32)
    return found.view(3, -1, _BLOCK).transpose(0, 1).contiguous()
