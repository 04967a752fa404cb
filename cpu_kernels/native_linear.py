"""Linears with int8 weights by native kernels: all between a linear's input and its result is one call.

Three times as fast as torch's at one row, and in long prompts half again: torch's kernels need the activations
quantized before and scaled after, each in passes of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cpu_kernels.blocks import (
    BLOCK,
    BY_GELU,
    BY_SILU,
    FEW,
    HALF,
    NO_GATING,
    ROW_BLOCK,
    STEP,
    by_blocks,
    in_blocks,
    out_of_blocks,
    padded,
    sums_size,
)
from cpu_kernels.int8_weights import QMAX, Int8Rows, Outliers, pieces
from cpu_kernels.linear import NO_DELTAS, ZERO, GatedCall
from cpu_kernels.native_kernel import Launcher, NativeKernel


class NativeLinear:
    """A weight packed in blocks (``blocks.py``), multiplied by one of the kernels of ``gemm.py``."""

    def __init__(
        self,
        launch: Launcher,
        gemm: NativeKernel,
        rows: Int8Rows,
        bias: torch.Tensor | None = None,
        outliers: Outliers | None = None,
        *,
        tiles: bool,
    ) -> None:
        self._launch, self._gemm = launch, gemm
        self.num_outputs, self.num_inputs = rows.integers.shape
        self._has_tiles = tiles
        self._weights = in_blocks(rows.integers)
        self._width = 4 * self._weights.shape[1]
        self._row_scales = rows.scales
        self._constants = _constants(rows, bias)
        self._outliers = outliers
        weights = torch.empty(0, self.num_outputs) if outliers is None else outliers.weights
        self._outlier_weights = by_blocks(weights).transpose(0, 1).contiguous()
        self._fixed = self._addresses()

    def __call__(self, x: torch.Tensor, deltas: tuple[int, int] = NO_DELTAS) -> torch.Tensor:
        """float32 [..., in] -> a new float32 [..., out]."""
        y = torch.empty(*x.shape[:-1], self.num_outputs)
        return self._multiply(x, y, NO_GATING, deltas)

    @property
    def gated(self) -> GatedCall | None:
        """See ``PackedLinear``: where both halves of the outputs are whole parts of blocks."""
        return self._gated if self.num_outputs % BLOCK == 0 else None

    def can_add_deltas(self, sizes: Sequence[int]) -> bool:
        """With AMX, where inputs and outputs are whole tiles."""
        return self._has_tiles and self.num_inputs % STEP == 0 and all(size % HALF == 0 for size in sizes)

    def in_floats(self) -> torch.Tensor:
        """The weight it multiplies with, float32 [out, in]."""
        integers = out_of_blocks(self._weights, self.num_outputs, self.num_inputs)
        weight = integers * self._row_scales[:, None]
        return weight if self._outliers is None else self._outliers.put_into(weight)

    def _gated(self, x: torch.Tensor, deltas: tuple[int, int] = NO_DELTAS, *, by_gelu: bool = False) -> torch.Tensor:
        num_units, num_rows = self.num_outputs // 2, x.numel() // self.num_inputs
        memory = self._launch.workspace("units", 4 * num_rows * num_units, reuse=num_rows > FEW)
        y = memory.view(torch.float32).view(*x.shape[:-1], num_units)
        return self._multiply(x, y, BY_GELU if by_gelu else BY_SILU, deltas)

    def _multiply(self, x: torch.Tensor, y: torch.Tensor, gating: int, deltas: tuple[int, int]) -> torch.Tensor:
        if not x.is_contiguous():
            x = x.contiguous()
        num_rows = x.numel() // self.num_inputs
        num_padded = padded(num_rows, ROW_BLOCK)
        sums = sums_size(num_rows, self._width, len(self._weights))
        num_apart = 0 if self._outliers is None else len(self._outliers.indices)
        num_bytes = sums + num_padded * (self._width + 4 + 4 * num_apart)
        scratch = self._launch.workspace("scratch", num_bytes, reuse=num_rows > FEW)
        grid = scratch.data_ptr() + sums
        largest = grid + num_padded * self._width
        self._launch(
            self._gemm, torch.get_num_threads(), x.data_ptr(), num_rows, y.data_ptr(), gating, grid, largest,
            largest + 4 * num_padded, scratch.data_ptr(), *self._fixed, *deltas,
        )  # fmt: skip
        return y

    def _addresses(self) -> tuple[int, ...]:
        """What stays the same from call to call, in the order of the kernel's fields."""
        outliers = self._outliers
        apart = (0, 0, 0, 0)
        if outliers is not None:
            mask, indices, weights = outliers.others, outliers.indices, self._outlier_weights
            apart = (mask.data_ptr(), len(indices), indices.data_ptr(), weights.data_ptr())
        sizes = (self.num_inputs, self.num_outputs, self._width, len(self._weights))
        return *sizes, self._weights.data_ptr(), self._constants.data_ptr(), *apart


def _constants(rows: Int8Rows, bias: torch.Tensor | None) -> torch.Tensor:
    """What the sums of each block are finished with, int32 [blocks, 3, 32]: zeros, and the bits of scales and bias."""
    # in pieces, as torch has a whole copy in int32 to sum up
    zeros = torch.cat([piece.sum(1, dtype=torch.int32) for piece in pieces(rows.integers)]) * -ZERO
    bias = torch.zeros(len(zeros)) if bias is None else bias.contiguous()
    scales = rows.scales * (1.0 / QMAX)
    found = torch.stack([zeros, scales.view(torch.int32), bias.view(torch.int32)])
    return by_blocks(found).transpose(0, 1).contiguous()
