"""Random sampling with temperature, top-k, top-p and min-p, without sorting the vocabulary.

A token is drawn in proportion to its weight, first a block by its sum, then a token within it (``categorical``).
Filters are applied in transformers' order. Each keeps the first tokens of one order,
the likeliest first and equals by id:

- top-k gathers its tokens; the filters behind it see rows of k candidates;
- min-p (Nguyen et al. 2024) sets smaller weights to zero;
- top-p (Holtzman et al. 2020) rejects a token outside of its set, and draws again among likelier ones.

A row's token is a function of its logits, its parameters, its seed and its number alone. Weights and the sums of their
blocks are computed row by row, in an order that depends on the width of a row alone; sums of blocks are added up on the
host, in double precision.

The set of top-p is the smallest one of the likeliest indices whose weights reach ``top_p`` of the total; equals by
index. An index is inside if it and all less likely ones weigh more than what the set may leave out. That needs no
order: one sum over the row, or over a part of it, or no sum where the index alone weighs enough. ``top_p`` of all
draws are inside, however flat or peaked the row is, and a rejected index bounds the set, so that few attempts reach
even a small one (the idea of FlashInfer's sampling kernels, Ye et al. 2025).
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf

import numpy as np
import torch

from cpu_kernels.softmax import BLOCK
from server.model.categorical import (
    Doubles,
    RowWeights,
    StoredWeights,
    TokenIds,
    block_indices,
    block_maxima,
    block_sums,
    on_host,
    pick,
    stream,
    totals,
    weights_above,
)
from server.sequence import SampleRow, SamplingParams

_PART = 4
"""Top-p first sums 1 / _PART of the blocks: that is enough for most indices of the set."""


Softmax = Callable[[torch.Tensor, torch.Tensor, SequenceOf[float]], RowWeights]
"""``f(logits, largest, temperatures)``: the weights of rows of logits, each in proportion to exp(logit / temperature).

The logits are [rows, width], ``largest`` [rows] the largest of each row.
"""


def draw_tokens(
    logits: torch.Tensor, largest: torch.Tensor, draws: SequenceOf[SampleRow], softmax: Softmax = StoredWeights.softmax
) -> list[int]:
    """A token for each row of logits [len(draws), vocab]; minus infinity is never drawn.

    ``largest`` [len(draws)] are the largest logits, finite.
    """
    vocab_size = logits.shape[1]
    rows_by_width: dict[int, list[int]] = defaultdict(list)
    for row, draw in enumerate(draws):
        rows_by_width[draw.sequence.params.top_k or vocab_size].append(row)
    tokens = [0] * len(draws)
    for width, rows in rows_by_width.items():
        selected, most = (logits, largest) if len(rows) == len(draws) else (logits[rows], largest[rows])
        chosen = [draws[row] for row in rows]
        if width >= vocab_size:
            drawn = _draw(selected, most, chosen, softmax)
        else:
            drawn = _draw_of_top_k(selected, most, chosen, width, softmax)
        for row, token in zip(rows, drawn, strict=True):
            tokens[row] = token
    return tokens


def _draw_of_top_k(
    logits: torch.Tensor, largest: torch.Tensor, draws: SequenceOf[SampleRow], top_k: int, softmax: Softmax
) -> list[int]:
    ids = likeliest(logits, top_k)  # [rows, top_k]
    tokens = ids.cpu().numpy()
    indices = _draw(logits.gather(1, ids), largest, draws, softmax, tokens)
    return [int(row[index]) for row, index in zip(tokens, indices, strict=True)]


def _draw(
    logits: torch.Tensor,
    largest: torch.Tensor,
    draws: SequenceOf[SampleRow],
    softmax: Softmax,
    ids: TokenIds | None = None,
) -> list[int]:
    """An index of each row of logits [len(draws), width], by every filter but top-k; ``ids``: the indices' tokens."""
    params = [draw.sequence.params for draw in draws]
    weights = softmax(logits, largest, [row.temperature for row in params])
    sums = on_host(weights.block_sums())
    sums_before_min_p = sums
    if any(row.min_p > 0.0 for row in params):
        _apply_min_p(weights, params)
        sums = on_host(weights.block_sums())
    indices, own = pick(weights, sums, [stream(draw.sequence.seed, draw.number) for draw in draws], ids)
    if any(row.top_p < 1.0 for row in params):
        redraw_outside(indices, own, weights, sums_before_min_p, draws, ids)
    return indices


def _apply_min_p(weights: RowWeights, params: SequenceOf[SamplingParams]) -> None:
    """Set weights less than ``min_p`` of their row's largest to zero."""
    most = weights.largest()
    shares = torch.tensor([row.min_p for row in params], dtype=most.dtype, device=most.device)
    least = (shares * most).cpu()
    weights.set_floors(torch.nextafter(least, torch.zeros_like(least)).tolist())


def likeliest(logits: torch.Tensor, count: int) -> torch.Tensor:
    """Token ids [rows, count] of the largest logits of each row [rows, vocab], ascending; of equals the first ones.

    They lie in the ``count`` blocks with the largest maxima, of equals the first: a logit of any other block comes
    after the maxima of these ``count`` blocks.
    """
    vocab_size = logits.shape[1]
    if count * BLOCK >= vocab_size:
        return _largest_indices(logits, count)
    indices = block_indices(_largest_indices(block_maxima(logits), count), vocab_size)
    inside = logits.gather(1, indices.clamp(max=vocab_size - 1)).masked_fill_(indices >= vocab_size, -torch.inf)
    return indices.gather(1, _largest_indices(inside, count))


def _largest_indices(values: torch.Tensor, count: int) -> torch.Tensor:
    """Indices [rows, count], ascending, of the largest of values [rows, width]; of equals the first ones."""
    least = values.topk(count, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    chosen = values >= least
    if int(chosen.sum()) > chosen.shape[0] * count:
        larger = values > least
        equal = values == least
        room = count - larger.sum(-1, keepdim=True)
        chosen = larger | (equal & (equal.cumsum(-1) <= room))
    return chosen.nonzero()[:, 1].view(len(values), count)


def redraw_outside(
    drawn: list[int],
    own: Doubles,
    weights: RowWeights,
    sums: Doubles,
    draws: SequenceOf[SampleRow],
    ids: TokenIds | None = None,
) -> None:
    """Draw again, in place, those of ``drawn`` that top-p leaves out: an index for each row of weights [rows, width].

    ``own`` are the weights of ``drawn``; ``sums`` [rows, blocks] include weights that min-p has set to zero. ``ids``
    [rows, width] are the tokens of the indices if they differ from these.
    """
    just_less = np.nextafter(own.astype(np.float32), np.float32(0.0))
    whole = totals(sums)
    mass = whole * [draw.sequence.params.top_p for draw in draws]
    outside = whole - mass
    rows = [row for row, draw in enumerate(draws) if draw.sequence.params.top_p < 1.0 and own[row] <= outside[row]]
    for num_blocks in sorted({sums.shape[1] // _PART, sums.shape[1]} - {0}):
        if not rows:
            return
        as_likely = weights.block_sums_above(rows, [float(just_less[row]) for row in rows], num_blocks)
        less_likely = totals(sums[rows, :num_blocks]) - totals(on_host(as_likely))
        rows = [row for row, rest in zip(rows, less_likely, strict=True) if own[row] + rest <= outside[row]]
    for row in rows:
        tokens = None if ids is None else ids[row : row + 1]
        drawn[row] = _draw_inside(weights.row_weights(row), float(mass[row]), drawn[row], draws[row], tokens)


def _draw_inside(weights: torch.Tensor, mass: float, index: int, draw: SampleRow, ids: TokenIds | None) -> int:
    """``index`` if it is in the set of a row of weights [width] that reaches ``mass``, else another that is.

    Terminates, because after a rejected index comes a likelier one, or one of the set.
    """
    for attempt in itertools.count(1):
        weight = float(weights[index])
        candidates, sums = _above(weights, weight)
        likelier = float(totals(sums)[0])
        ends_here = likelier < mass  # the set ends among the indices of this weight
        if ends_here:
            equal = (weights == weight).nonzero()[:, 0]
            inside = equal[: min(math.ceil((mass - likelier) / weight), len(equal))]
            if index <= int(inside[-1]):
                break
            candidates[0, inside] = weight
            sums = on_host(block_sums(candidates))
        (index,), own = pick(StoredWeights(candidates), sums, [stream(draw.sequence.seed, draw.number, attempt)], ids)
        if ends_here or _is_surely_inside(weights, mass, float(own[0])):
            break
    return index


def _is_surely_inside(weights: torch.Tensor, mass: float, own: float) -> bool:
    """Whether all indices at least as likely as one of weight ``own``, without it, weigh less than ``mass``."""
    _, sums = _above(weights, float(np.nextafter(np.float32(own), np.float32(0.0))))
    return float(totals(sums)[0]) - own < mass


def _above(weights: torch.Tensor, floor: float) -> tuple[torch.Tensor, Doubles]:
    """Weights of one row [width] above ``floor``, others zero, as [1, width], and the sums of its blocks."""
    above = weights_above([weights], [floor])
    return above, on_host(block_sums(above))
