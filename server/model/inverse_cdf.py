"""A place drawn from each row of weights by the inverse of its cumulative distribution.

Sums of blocks are looked through on the host: there are few, and not every device has double precision.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from server.model.blocks import BLOCK

Doubles = NDArray[np.float64]


def pick(weights: torch.Tensor, sums: Doubles, fractions: Sequence[float]) -> tuple[list[int], Doubles]:
    """For each row of weights [rows, width] the first place where the running sum exceeds its fraction of the total.

    ``sums`` [rows, blocks] are those of the blocks, from ``on_host``; fractions are in [0, 1). A place whose weight is
    zero is never picked. Returns the places, and their weights [rows].
    """
    rows, width = np.arange(len(sums)), weights.shape[1]
    running = sums.cumsum(1)
    wanted = _less_than(running[:, -1], np.asarray(fractions) * running[:, -1])
    block = _first_above(running, wanted)
    mass = sums[rows, block]
    share = (wanted - (running[rows, block] - mass)) / mass  # of the block's weight, how much comes before

    places = block[:, None] * BLOCK + np.arange(min(BLOCK, width))
    near = torch.from_numpy(np.minimum(places, width - 1)).to(weights.device)
    inside = np.where(places < width, on_host(weights.gather(1, near)), 0.0)
    running = inside.cumsum(1)
    wanted = _less_than(running[:, -1], np.maximum(share, 0.0) * running[:, -1])
    within = _first_above(running, wanted)
    return (block * BLOCK + within).tolist(), inside[rows, within]


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


def _first_above(running: Doubles, wanted: Doubles) -> NDArray[np.int64]:
    """The first place of each row of running sums [rows, n] that exceeds what is wanted [rows]."""
    places: NDArray[np.int64] = (running <= wanted[:, None]).sum(1)
    return places


def _less_than(end: Doubles, wanted: Doubles) -> Doubles:
    """``wanted``, but less than ``end`` whatever was rounded, so that a running sum up to ``end`` exceeds it."""
    return np.minimum(wanted, np.nextafter(end, 0.0))
