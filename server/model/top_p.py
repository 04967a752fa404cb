"""Top-p (Holtzman et al. 2020) by rejection: what is drawn outside of the set is drawn again, among likelier places.

The set is the smallest one of the likeliest places whose weights reach ``top_p`` of the total; equals by place. So a
place is inside where it and all less likely ones weigh more than what the set may leave out. That takes no order: one
sum over the row, or over a part of it, or no sum at all where the place alone weighs enough. ``top_p`` of all draws are
inside, however flat or peaked the row is, and a rejected place bounds the set, so that few attempts reach even a small
one (the idea of FlashInfer's sampling kernels, Ye et al. 2025).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence as SequenceOf

import numpy as np
import torch

from server.model.blocks import BLOCK, block_sums
from server.model.categorical import Doubles, TokenIds, on_host, pick, totals, weights_above
from server.model.random_numbers import stream
from server.sequence import SampleRow

_PART = 4
"""One block in so many is looked at first: most places that are inside show it there."""


def redraw_outside(
    places: list[int],
    own: Doubles,
    weights: torch.Tensor,
    sums: Doubles,
    draws: SequenceOf[SampleRow],
    ids: TokenIds | None = None,
) -> None:
    """Replace those of ``places``, one for each row of weights [rows, width], that top-p leaves out.

    ``own`` are the places' weights, ``sums`` those of the blocks, also of such weights as are zero by now. ``ids``
    [rows, width] are the places' tokens where these are not the places themselves.
    """
    just_less = np.nextafter(own.astype(np.float32), np.float32(0.0))
    whole = totals(sums)
    mass = whole * [draw.sequence.params.top_p for draw in draws]
    outside = whole - mass
    rows = [row for row, draw in enumerate(draws) if draw.sequence.params.top_p < 1.0 and own[row] <= outside[row]]
    for num_blocks in sorted({sums.shape[1] // _PART, sums.shape[1]} - {0}):
        if not rows:
            return
        part = weights[:, : num_blocks * BLOCK]
        as_likely = weights_above([part[row] for row in rows], [float(just_less[row]) for row in rows])
        less_likely = totals(sums[rows, :num_blocks]) - totals(on_host(block_sums(as_likely)))
        rows = [row for row, rest in zip(rows, less_likely, strict=True) if own[row] + rest <= outside[row]]
    for row in rows:
        tokens = None if ids is None else ids[row : row + 1]
        places[row] = _draw_inside(weights[row], float(mass[row]), places[row], draws[row], tokens)


def _draw_inside(weights: torch.Tensor, mass: float, place: int, draw: SampleRow, ids: TokenIds | None) -> int:
    """``place`` if it is in the set of a row of weights [width] that reaches ``mass``, else another that is.

    Ends, because each rejected place is followed by one that is likelier, or by one of the whole set.
    """
    for attempt in itertools.count(1):
        weight = float(weights[place])
        candidates, sums = _above(weights, weight)
        likelier = float(totals(sums)[0])
        ends_here = likelier < mass  # the set ends among the places of this weight
        if ends_here:
            equal = (weights == weight).nonzero()[:, 0]
            inside = equal[: min(math.ceil((mass - likelier) / weight), len(equal))]
            if place <= int(inside[-1]):
                break
            candidates[0, inside] = weight
            sums = on_host(block_sums(candidates))
        (place,), own = pick(candidates, sums, [stream(draw.sequence.seed, draw.number, attempt)], ids)
        if ends_here or _is_surely_inside(weights, mass, float(own[0])):
            break
    return place


def _is_surely_inside(weights: torch.Tensor, mass: float, own: float) -> bool:
    """Whether the weights of all places that are as likely, but for one, are less than ``mass``."""
    _, sums = _above(weights, float(np.nextafter(np.float32(own), np.float32(0.0))))
    return float(totals(sums)[0]) - own < mass


def _above(weights: torch.Tensor, floor: float) -> tuple[torch.Tensor, Doubles]:
    """The weights of one row [width] above ``floor`` as a row [1, width], and the sums of its blocks."""
    above = weights_above([weights], [floor])
    return above, on_host(block_sums(above))
