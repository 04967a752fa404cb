"""Finds outlier channels: the few inputs of a linear that are far larger than the others, multiplied in float32.

Trained models have such channels (Dettmers et al. 2022, LLM.int8()). The scale of a row is its largest number, so that
beside a channel a hundred times larger all others would be rounded to zero.
"""

from __future__ import annotations

import torch

FACTOR = 4.0
"""Least ratio to the median channel. On 13 rows Gaussian channels reach 2, products of two of them 3."""
MOST = 8
"""Most outliers of a linear, so that their cost is negligible."""


def find_outliers(x: torch.Tensor) -> torch.Tensor | None:
    """Indices of the outlier channels of rows [..., in]; None if there are none.

    The size of a channel is its root mean square, so that a channel counts that is large in some rows only, as on one
    kind of text. Its largest row is left out: one large number is no outlier channel.
    """
    squares = x.reshape(-1, x.shape[-1]).float().square()
    sizes = (squares.sum(0) - squares.amax(0)).clamp_min_(0).div_(max(1, len(squares) - 1)).sqrt_()
    border = FACTOR * sizes.median()
    indices = (sizes > border).nonzero()[:, 0]
    if not len(indices) or not border > 0:
        return None
    return indices if len(indices) <= MOST else sizes.topk(MOST).indices.sort().values
