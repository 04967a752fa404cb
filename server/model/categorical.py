"""A place drawn from each row of weights in their proportions, by the Gumbel-max trick in two levels.

The largest of weights that are each divided by an exponential random number of their own is every place with the
probability of its weight (Gumbel 1954; Maddison et al. 2014). First a block is drawn by its sum, then a place inside,
so that few random numbers are needed. A number belongs to a token, not to a place in a cumulative sum: where rounding
changes all weights a little, as a neighbour in the batch does, the token drawn changes about as rarely as it can.

Sums of blocks are looked through on the host: there are few, and not every device has double precision.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from server.model.blocks import BLOCK
from server.model.random_numbers import exponentials

Doubles = NDArray[np.float64]
TokenIds = NDArray[np.int64]
_BLOCK_STREAM = 0x5851F42D4C957F2D
"""Added to a stream, it is another one: that by which blocks are drawn."""


def pick(
    weights: torch.Tensor, sums: Doubles, streams: Sequence[int], ids: TokenIds | None = None
) -> tuple[list[int], Doubles]:
    """A place of each row of weights [rows, width], one whose weight is not zero, by the row's random stream.

    ``sums`` [rows, blocks] are those of the blocks, from ``on_host``; ``ids`` [rows, width] are the places' tokens
    where these are not the places themselves. Returns the places, and their weights [rows].
    """
    rows, (num_blocks, width) = np.arange(len(sums)), (sums.shape[1], weights.shape[1])
    of_blocks = [(one + _BLOCK_STREAM) % 2**64 for one in streams]
    block = (sums / exponentials(of_blocks, np.arange(num_blocks))).argmax(1)

    places = block[:, None] * BLOCK + np.arange(min(BLOCK, width))
    near = np.minimum(places, width - 1)
    inside = np.where(places < width, on_host(weights.gather(1, torch.from_numpy(near).to(weights.device))), 0.0)
    tokens = near if ids is None else np.take_along_axis(ids, near, 1)
    within = (inside / exponentials(streams, tokens)).argmax(1)
    return places[rows, within].tolist(), inside[rows, within]


def weights_above(rows: Sequence[torch.Tensor], floors: Sequence[float]) -> torch.Tensor:
    """The weights of each row [width] that are greater than its floor, zero in place of the others: [rows, width]."""
    kept = rows[0].new_empty(len(rows), len(rows[0]))
    for row, floor, out in zip(rows, floors, kept, strict=True):
        torch.threshold(row, floor, 0.0, out=out)
    return kept


def on_host(sums: torch.Tensor) -> Doubles:
    """In double precision."""
    return sums.cpu().numpy().astype(np.float64)


def totals(sums: Doubles) -> Doubles:
    """Of each row [rows, blocks], added up in their order."""
    return sums.cumsum(1)[:, -1]
