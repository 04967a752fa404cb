"""A few inputs of a product that are far larger than the others, and are multiplied in float32.

Trained models have such channels (Dettmers et al. 2022, LLM.int8()). A row is divided by its largest number, so that
beside a channel a hundred times larger than the rest nothing would be left of these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

FACTOR = 4.0
"""How far above the middle channel one must be: Gaussian ones are 2 times on 13 rows, products of two of them 3."""
MOST = 8
"""Columns of a product at most, so that they cost next to nothing."""
_PIECE_NUMBERS = 1 << 16
"""Sums added to at a time, so that a core's cache holds them while all columns are added."""


@dataclass(frozen=True, eq=False)
class Outliers:
    """``indices`` [n] of inputs, ``others`` [in] with 0 at these and 1 elsewhere, their ``weights`` [n, out]."""

    indices: torch.Tensor
    others: torch.Tensor
    weights: torch.Tensor

    @classmethod
    def of(cls, indices: torch.Tensor, weights: Sequence[torch.Tensor]) -> Outliers:
        """Of weights [out, in] that lie one below the other."""
        others = torch.ones(weights[0].shape[1])
        others[indices] = 0.0
        columns = torch.cat([weight[:, indices].float() for weight in weights])
        return cls(indices, others, columns.t().contiguous())

    def added_to(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The product of the others y [rows, out] with that of these inputs of x [rows, in], in y.

        One input after another: a matrix product adds up in an order that depends on the number of rows on some CPUs.
        """
        step = max(1, _PIECE_NUMBERS // y.shape[1])
        for rows, sums in zip(x.split(step), y.split(step), strict=True):
            products = rows[:, self.indices].t()[:, :, None] * self.weights[:, None]  # [n, rows, out]
            for product in products.unbind():
                sums += product
        return y

    def put_into(self, weight: torch.Tensor) -> torch.Tensor:
        """A weight [out, in] with these columns exact, in place."""
        weight[:, self.indices] = self.weights.t()
        return weight


def find_outliers(x: torch.Tensor) -> torch.Tensor | None:
    """Indices of inputs whose size over rows [..., in] stands out; None where none does.

    The size is the root of the mean square, so that an input counts which is large in some rows only, as on one kind of
    text; the row in which it is largest is left out, since one row alone makes no channel.
    """
    squares = x.reshape(-1, x.shape[-1]).float().square()
    sizes = (squares.sum(0) - squares.amax(0)).clamp_min_(0).div_(max(1, len(squares) - 1)).sqrt_()
    border = FACTOR * sizes.median()
    indices = (sizes > border).nonzero()[:, 0]
    if not len(indices) or not border > 0:
        return None
    return indices if len(indices) <= MOST else sizes.topk(MOST).indices.sort().values
