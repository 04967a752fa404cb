"""How an adapter's A and B lie in memory for tiles of AMX, in bfloat16: pairs of what is summed over side by side."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cpu_kernels.blocks import HALF, STEP

_REACH = 512
"""Numbers that a tile has, so far from where B's last outputs begin it reaches; A's last ones reach a line further."""
_LINE = 32


@dataclass(frozen=True, eq=False)
class DeltaTiles:
    """``b`` [out / 16, rank / 2, 16, 2] and behind it ``a`` [in / 2, rank, 2], both in one flat ``memory``.

    ``rank`` is that in memory, an even number; a rank that the adapter has not is zeros. Whole tiles reach from B into
    A, and from A into a few numbers more.
    """

    memory: torch.Tensor
    rank: int
    num_outputs: int

    @classmethod
    def of(cls, a: torch.Tensor, b: torch.Tensor) -> DeltaTiles:
        """From a [in, rank] and b [rank, out]; in is a multiple of 32, out of 16."""
        (num_inputs, rank), num_outputs = a.shape, b.shape[1]
        assert num_inputs % STEP == num_outputs % HALF == 0
        even = rank + rank % 2
        size = num_outputs * even + max(num_inputs * even + _LINE, _REACH)
        tiles = cls(torch.zeros(size, dtype=torch.bfloat16), even, num_outputs)
        tiles._a(num_inputs)[:, :rank].copy_(a.view(num_inputs // 2, 2, rank).transpose(1, 2))
        for first in range(2):
            half = b[first::2].view(-1, num_outputs // HALF, HALF)
            tiles._b()[:, : len(half), :, first].copy_(half.transpose(0, 1))
        return tiles

    @property
    def b_address(self) -> int:
        """Where B begins."""
        return self.memory.data_ptr()

    @property
    def a_address(self) -> int:
        """Where A begins."""
        return self.b_address + self.memory.itemsize * self.num_outputs * self.rank

    def in_floats(self, num_inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
        """a [in, rank] and b [rank, out], float32, as they were rounded."""
        a, b = self._a(num_inputs).float(), self._b().float()
        return a.transpose(1, 2).reshape(-1, self.rank), b.permute(1, 3, 0, 2).reshape(self.rank, -1)

    def _a(self, num_inputs: int) -> torch.Tensor:
        first = self.num_outputs * self.rank
        return self.memory[first : first + num_inputs * self.rank].view(-1, self.rank, 2)

    def _b(self) -> torch.Tensor:
        return self.memory[: self.num_outputs * self.rank].view(-1, self.rank // 2, HALF, 2)
