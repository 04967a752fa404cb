"""Weights as int8 with one scale for each output (symmetric, round to nearest), and outlier inputs kept in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

QMAX = 127
"""The largest quantized value."""
QMAX_16BIT_SAFE = 64
"""The largest quantized weight where pairs of products are added in 16 bits (AVX2, AVX-512 without VNNI).

2 * 255 * 64 is below 2**15. Smaller activations would fit as well, but lose more: they have larger outliers.
"""
_PIECE_NUMBERS = 1 << 19
Reader = Callable[[torch.Tensor], Iterable[torch.Tensor]]
"""Yields a weight's rows piece by piece, each to be used before the next."""
_TINY = 1e-30
_SUM_NUMBERS = 1 << 16
"""Sums that are updated at a time, so that a core's cache holds them while all columns are added."""


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
        qmax: int = QMAX,
        read: Reader | None = None,
    ) -> Int8Rows:
        """Weights [out, in] of equal width, one below the other, in integers of ``-qmax`` to ``qmax``.

        ``read`` reads a weight that is not all in memory.
        """
        out = sum(len(weight) for weight in weights)
        integers = torch.empty(out, weights[0].shape[1], dtype=torch.int8)
        scales = torch.empty(out)
        row = 0
        for weight in weights:
            for piece in (read or pieces)(weight):
                rows = slice(row, row + len(piece))
                numbers = piece.float()
                scales[rows] = numbers.abs().amax(1).clamp_min_(_TINY) / qmax
                integers[rows] = (numbers / scales[rows, None]).round_().to(torch.int8)
                row += len(piece)
        return cls(integers, scales)

    def in_floats(self) -> torch.Tensor:
        """The dequantized weight, float32 [out, in]."""
        return self.integers * self.scales[:, None]


@dataclass(frozen=True, eq=False)
class Outliers:
    """Inputs of a linear that are multiplied in float32, as they are far larger than the others (Dettmers et al. 2022).

    ``indices`` int64 [n]; ``inlier_mask`` float32 [in], 0 at these and 1 elsewhere; ``weights`` float32 [n, out].
    """

    indices: torch.Tensor
    inlier_mask: torch.Tensor
    weights: torch.Tensor

    @classmethod
    def of(cls, indices: torch.Tensor, weights: Sequence[torch.Tensor], *, read: Reader | None = None) -> Outliers:
        """The outliers of weights [out, in] whose outputs are concatenated."""
        inlier_mask = torch.ones(weights[0].shape[1])
        inlier_mask[indices] = 0.0
        columns = torch.cat([piece[:, indices].float() for weight in weights for piece in (read or pieces)(weight)])
        return cls(indices, inlier_mask, columns.t().contiguous())

    def added_to(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """y [rows, out] += the outliers' part of x [rows, in], in place; returns y.

        One input after another: a matrix product adds up in an order that depends on the number of rows on some CPUs.
        """
        step = max(1, _SUM_NUMBERS // y.shape[1])
        for rows, sums in zip(x.split(step), y.split(step), strict=True):
            products = rows[:, self.indices].t()[:, :, None] * self.weights[:, None]  # [n, rows, out]
            for product in products.unbind():
                sums += product
        return y

    def put_into(self, weight: torch.Tensor) -> torch.Tensor:
        """Set the exact columns of a weight [out, in], in place; returns it."""
        weight[:, self.indices] = self.weights.t()
        return weight


def pieces(weight: torch.Tensor) -> Sequence[torch.Tensor]:
    """Slices of a weight's rows, each as large as a core's cache holds in float32."""
    split: Sequence[torch.Tensor] = weight.split(max(1, _PIECE_NUMBERS // weight.shape[1]))
    return split
