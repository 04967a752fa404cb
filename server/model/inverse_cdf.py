"""A place drawn from each row of weights by the inverse of its cumulative distribution."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from server.model.blocks import BLOCK, block_places


def pick(weights: torch.Tensor, sums: torch.Tensor, fractions: Sequence[float]) -> list[int]:
    """For each row of weights [rows, width] the first place where the running sum exceeds its fraction of the total.

    ``sums`` [rows, blocks] are those of the blocks, from ``on_host``; fractions are in [0, 1). A place whose weight is
    zero is never picked.
    """
    running = sums.cumsum(-1)
    totals = running[:, -1:]
    wanted = _less_than(totals, torch.tensor(fractions, dtype=torch.float64)[:, None] * totals)
    block = torch.searchsorted(running, wanted, right=True)
    mass = sums.gather(1, block)
    share = (wanted - (running.gather(1, block) - mass)) / mass  # of the block's weight, how much comes before

    places = block_places(block.to(weights.device), weights.shape[1])
    inside = weights.gather(1, places.clamp(max=weights.shape[1] - 1)).masked_fill_(places >= weights.shape[1], 0.0)
    running = on_host(inside).cumsum(-1)
    totals = running[:, -1:]
    place = torch.searchsorted(running, _less_than(totals, share.clamp_(min=0.0) * totals), right=True)
    picked: list[int] = (block * BLOCK + place)[:, 0].tolist()
    return picked


def weights_above(rows: Sequence[torch.Tensor], floors: Sequence[float]) -> torch.Tensor:
    """The weights of each row [width] that are greater than its floor, zero in place of the others: [rows, width]."""
    kept = rows[0].new_empty(len(rows), len(rows[0]))
    for row, floor, out in zip(rows, floors, kept, strict=True):
        torch.threshold(row, floor, 0.0, out=out)
    return kept


def on_host(sums: torch.Tensor) -> torch.Tensor:
    """In double precision, which not every device has."""
    return sums.cpu().double()


def _less_than(end: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """``wanted``, but less than ``end`` whatever was rounded, so that a running sum up to ``end`` exceeds it."""
    return torch.minimum(wanted, torch.nextafter(end, torch.zeros_like(end)))
