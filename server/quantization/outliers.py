"""Finds the few inputs of a linear that are far larger than the others, and are multiplied in float32.

Trained models have such channels (Dettmers et al. 2022, LLM.int8()). A row is divided by its largest number, so that
beside a channel a hundred times larger than the rest nothing would be left of these.
"""

from __future__ import annotations

import torch

FACTOR = 4.0
"""How far above the middle channel one must be: Gaussian ones are 2 times on 13 rows, products of two of them 3."""
MOST = 8
"""Columns of a product at most, so that they cost next to nothing."""


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
