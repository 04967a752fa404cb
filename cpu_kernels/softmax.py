"""Softmax weights of rows of logits and their sums by block, each in one pass and without a copy of the rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cpu_kernels.c_kernel import CKernel
from cpu_kernels.native_kernel import Launcher

SOFTMAX_BLOCKS = CKernel(
    "softmax_blocks",
    "logits row_stride width rows num_rows first_blocks num_blocks largest factors floors maxima blocks_of_row "
    "sums new_maxima weights",
)
BLOCK = 256
"""Logits of a block (``csrc/softmax.h``); the last one of a row may be shorter."""


class SoftmaxRows:
    """The weights exp((logit - largest) / temperature) of rows of logits [rows, width], computed when needed.

    The logits are float32 on the CPU; ``largest`` [rows] are the largest, and finite. Weights and sums of a row are the
    same to the bit beside any other rows and with any number of threads.
    """

    def __init__(
        self, launch: Launcher, logits: torch.Tensor, largest: torch.Tensor, temperatures: Sequence[float]
    ) -> None:
        self._launch = launch
        self._logits = logits if logits.stride(-1) == 1 else logits.contiguous()
        self.num_rows, self.width = logits.shape
        self._num_blocks = -(-self.width // BLOCK)
        self._factors = 1.0 / torch.tensor(temperatures)
        self._largest = largest.contiguous()
        self._floors = [0.0] * self.num_rows
        self._maxima: torch.Tensor | None = None

    def largest(self) -> torch.Tensor:
        """The largest weight of each row [rows]."""
        return torch.ones(self.num_rows)

    def set_floors(self, floors: Sequence[float]) -> None:
        """From now on a weight that is not greater than the floor of its row is zero."""
        self._floors = list(floors)

    def block_sums(self) -> torch.Tensor:
        """The sum of each block, float64 [rows, blocks]."""
        sums = torch.empty(self.num_rows, self._num_blocks, dtype=torch.float64)
        if self._maxima is None:
            maxima = torch.empty(sums.shape)
            self._run(range(self.num_rows), self._floors, self._num_blocks, sums=sums, new_maxima=maxima)
            self._maxima = maxima
        else:
            self._run(range(self.num_rows), self._floors, self._num_blocks, sums=sums)
        return sums

    def block_sums_above(self, rows: Sequence[int], floors: Sequence[float], num_blocks: int) -> torch.Tensor:
        """The sums of the first blocks of these rows, of weights greater than ``floors``: float64 [rows, blocks]."""
        sums = torch.empty(len(rows), num_blocks, dtype=torch.float64)
        higher = [max(floor, self._floors[row]) for row, floor in zip(rows, floors, strict=True)]
        self._run(rows, higher, num_blocks, sums=sums)
        return sums

    def block_weights(self, blocks: torch.Tensor) -> torch.Tensor:
        """The weights of one block of each row, blocks int64 [rows]: [rows, BLOCK], zeros behind the end of a row."""
        weights = torch.empty(self.num_rows, BLOCK)
        self._run(range(self.num_rows), self._floors, 1, first_blocks=blocks, weights=weights)
        return weights

    def row_weights(self, row: int) -> torch.Tensor:
        """All weights of a row [width]."""
        weights = torch.empty(self._num_blocks * BLOCK)
        self._run([row], [self._floors[row]], self._num_blocks, weights=weights)
        return weights[: self.width]

    def _run(
        self,
        rows: Sequence[int],
        floors: Sequence[float],
        num_blocks: int,
        *,
        first_blocks: torch.Tensor | None = None,
        sums: torch.Tensor | None = None,
        new_maxima: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
    ) -> None:
        numbers, lowest = torch.tensor(rows, dtype=torch.long), torch.tensor(floors)
        self._launch(
            SOFTMAX_BLOCKS, torch.get_num_threads(), self._logits.data_ptr(), self._logits.stride(0), self.width,
            numbers.data_ptr(), len(numbers), _address(first_blocks), num_blocks, self._largest.data_ptr(),
            self._factors.data_ptr(), lowest.data_ptr(), _address(self._maxima), self._num_blocks, _address(sums),
            _address(new_maxima), _address(weights),
        )  # fmt: skip


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
