"""Logits to tokens: the likeliest one, or one drawn at random.

Each token of a sequence has random numbers of its own, a function of the sequence's seed and the token's number, so
that neither neighbours nor drafts change what is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import torch

from server.model.blocks import largest
from server.model.drawing import draw_tokens
from server.model.logits.registry import LogitsProcessing
from server.model.logprobs import sampled_tokens
from server.sequence import Draw, SampledToken


class Sampler:
    """Chooses tokens; of sequences with logits processors it keeps those."""

    def __init__(self) -> None:
        self._processing = LogitsProcessing()

    def sample(self, logits: torch.Tensor, draws: SequenceOf[Draw]) -> list[SampledToken | None]:
        """A token for each row of ``logits`` [len(draws), vocab].

        None where the row is not finite, and where the token before did not come out as the draw has it given.
        """
        if not draws:
            return []
        raw_logits = logits.float()
        logits = self._processing(raw_logits, draws)
        values, likeliest = largest(logits)
        finite, greedy = values.isfinite().tolist(), likeliest.tolist()  # of a row with NaN the largest is NaN
        chosen: list[int | None] = [
            token if is_finite else None for token, is_finite in zip(greedy, finite, strict=True)
        ]
        rows = [row for row, draw in enumerate(draws) if finite[row] and not draw.sequence.params.greedy]
        if rows:
            selected = logits if len(rows) == len(draws) else logits[rows]
            for row, token in zip(rows, draw_tokens(selected, [draws[row] for row in rows]), strict=True):
                chosen[row] = token
        return sampled_tokens(raw_logits, _until_a_draft_is_wrong(chosen, draws), draws)


def _until_a_draft_is_wrong(chosen: SequenceOf[int | None], draws: SequenceOf[Draw]) -> list[int | None]:
    tokens: list[int | None] = []
    for token, draw in zip(chosen, draws, strict=True):
        tokens.append(token if draw.given is None or draw.given == tokens[-1] else None)
    return tokens
