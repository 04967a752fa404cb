"""How an adapter's A and B lie in memory for tiles of AMX, in bfloat16: pairs of what is summed over side by side."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from server.native.blocks import HALF, STEP

_RANKS = 8
_SLACK = 512
"""Numbers behind the last, which whole tiles of the last ranks reach into."""


@dataclass(frozen=True, eq=False)
class DeltaTiles:
    """``a`` [in / 2, rank, 2] and ``b`` [out / 16, rank / 2, 16, 2], both flat, with zeros behind the adapter's rank.

    ``rank`` is that in memory, a multiple of 8.
    """

    a: torch.Tensor
    b: torch.Tensor
    rank: int

    @classmethod
    def of(cls, a: torch.Tensor, b: torch.Tensor) -> DeltaTiles:
        """From a [in, rank] and b [rank, out]; in is a multiple of 32, out of 16."""
        assert a.shape[0] % STEP == b.shape[1] % HALF == 0
        (num_inputs, rank), num_outputs = a.shape, b.shape[1]
        padded = -(-rank // _RANKS) * _RANKS
        tiles = cls(_zeros(num_inputs * padded), _zeros(num_outputs * padded), padded)
        tiles._a()[:, :rank].copy_(a.view(num_inputs // 2, 2, rank).transpose(1, 2))
        for first in range(2):
            half = b[first::2].view(-1, num_outputs // HALF, HALF)
            tiles._b()[:, : len(half), :, first].copy_(half.transpose(0, 1))
        return tiles

    def tensors(self) -> Iterator[torch.Tensor]:
        """What takes memory."""
        yield from (self.a, self.b)

    def in_floats(self) -> tuple[torch.Tensor, torch.Tensor]:
        """a [in, rank] and b [rank, out], float32, as they were rounded."""
        a, b = self._a().float(), self._b().float()
        return a.transpose(1, 2).reshape(-1, self.rank), b.permute(1, 3, 0, 2).reshape(self.rank, -1)

    def _a(self) -> torch.Tensor:
        return self.a[:-_SLACK].view(-1, self.rank, 2)

    def _b(self) -> torch.Tensor:
        return self.b[:-_SLACK].view(-1, self.rank // 2, HALF, 2)


def _zeros(count: int) -> torch.Tensor:
    return torch.zeros(count + _SLACK, dtype=torch.bfloat16)
