"""Weights as 8-bit integers with one scale for each output (symmetric, round to nearest)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

LEVELS = 127
_PIECE_NUMBERS = 1 << 19
_TINY = 1e-30


@dataclass(frozen=True, eq=False)
class Int8Rows:
    """A weight [out, in] as ``integers`` int8 [out, in] times ``scales`` float32 [out]."""

    integers: torch.Tensor
    scales: torch.Tensor

    @classmethod
    def of(
        cls,
        weights: Sequence[torch.Tensor],
        *,
        levels: int = LEVELS,
        done: Callable[[torch.Tensor], None] | None = None,
    ) -> Int8Rows:
        """Weights [out, in] of equal width, one below the other, in integers of ``-levels`` to ``levels``.

        ``done`` is told each piece that was read.
        """
        out = sum(len(weight) for weight in weights)
        integers = torch.empty(out, weights[0].shape[1], dtype=torch.int8)
        scales = torch.empty(out)
        row = 0
        for weight in weights:
            for piece in pieces(weight):
                rows = slice(row, row + len(piece))
                numbers = piece.float()
                scales[rows] = numbers.abs().amax(1).clamp_min_(_TINY) / levels
                integers[rows] = (numbers / scales[rows, None]).round_().to(torch.int8)
                row += len(piece)
                if done is not None:
                    done(piece)
        return cls(integers, scales)

    def in_floats(self) -> torch.Tensor:
        """The weight these integers stand for, float32 [out, in]."""
        return self.integers * self.scales[:, None]


def pieces(weight: torch.Tensor) -> Sequence[torch.Tensor]:
    """Rows of a weight, as many at a time as a core's cache holds in float32."""
    split: Sequence[torch.Tensor] = weight.split(max(1, _PIECE_NUMBERS // weight.shape[1]))
    return split
