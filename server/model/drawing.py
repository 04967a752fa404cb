"""Tokens drawn with temperature, top-k, top-p and min-p, without sorting the vocabulary.

A token is drawn in proportion to its weight, first among the sums of blocks, then within one block (``categorical``).
Filters are applied in transformers' order. Each keeps the first tokens of one order,
the likeliest first and equals by id:

- top-k gathers its tokens, and all that follows sees rows of k candidates (``top_k``);
- min-p (Nguyen et al. 2024) sets smaller weights to zero;
- top-p rejects what was drawn outside of its set, and draws again (``top_p``).

A row's token is a function of its logits, its parameters, its seed and its number alone. Weights and the sums of their
blocks are computed row by row, in an order that the width of a row decides; what is added up beyond blocks is
added on the host, in double precision.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence as SequenceOf

import torch

from server.model.blocks import block_sums
from server.model.categorical import TokenIds, on_host, pick
from server.model.random_numbers import stream
from server.model.top_k import likeliest
from server.model.top_p import redraw_outside
from server.sequence import SampleRow, SamplingParams


def draw_tokens(logits: torch.Tensor, draws: SequenceOf[SampleRow]) -> list[int]:
    """A token for each row of logits [len(draws), vocab], whose largest is finite; minus infinity is never drawn."""
    vocab_size = logits.shape[1]
    rows_by_width: dict[int, list[int]] = defaultdict(list)
    for row, draw in enumerate(draws):
        rows_by_width[draw.sequence.params.top_k or vocab_size].append(row)
    tokens = [0] * len(draws)
    for width, rows in rows_by_width.items():
        selected = logits if len(rows) == len(draws) else logits[rows]
        chosen = [draws[row] for row in rows]
        drawn = _draw(selected, chosen) if width >= vocab_size else _draw_of_top_k(selected, chosen, width)
        for row, token in zip(rows, drawn, strict=True):
            tokens[row] = token
    return tokens


def _draw_of_top_k(logits: torch.Tensor, draws: SequenceOf[SampleRow], top_k: int) -> list[int]:
    ids = likeliest(logits, top_k)  # [rows, top_k]
    tokens = ids.cpu().numpy()
    places = _draw(logits.gather(1, ids), draws, tokens)
    return [int(row[place]) for row, place in zip(tokens, places, strict=True)]


def _draw(logits: torch.Tensor, draws: SequenceOf[SampleRow], ids: TokenIds | None = None) -> list[int]:
    """A place in each row of logits [len(draws), width], by every filter but top-k; ``ids`` are the places' tokens."""
    params = [draw.sequence.params for draw in draws]
    weights = _softmax(logits, params)
    sums = all_sums = on_host(block_sums(weights))
    if any(one.min_p > 0.0 for one in params):
        _apply_min_p(weights, params)
        sums = on_host(block_sums(weights))
    places, own = pick(weights, sums, [stream(draw.sequence.seed, draw.number) for draw in draws], ids)
    if any(one.top_p < 1.0 for one in params):
        redraw_outside(places, own, weights, all_sums, draws, ids)
    return places


def _softmax(logits: torch.Tensor, params: SequenceOf[SamplingParams]) -> torch.Tensor:
    temperatures = [one.temperature for one in params]
    if any(temperature != 1.0 for temperature in temperatures):
        logits = logits / torch.tensor(temperatures, dtype=logits.dtype, device=logits.device)[:, None]
    return logits.softmax(-1)


def _apply_min_p(weights: torch.Tensor, params: SequenceOf[SamplingParams]) -> None:
    """Set weights [rows, width] less than ``min_p`` of their row's largest to zero, in place."""
    shares = torch.tensor([one.min_p for one in params], dtype=weights.dtype, device=weights.device)
    least = (shares * weights.amax(-1)).cpu()
    floors = torch.nextafter(least, torch.zeros_like(least)).tolist()
    for row, floor in zip(weights, floors, strict=True):
        if floor > 0.0:
            torch.threshold_(row, floor, 0.0)
