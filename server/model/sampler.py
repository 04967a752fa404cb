"""Logits to tokens: greedy or random selection, among the tokens that a sequence's grammar allows.

The random numbers of a token are a function of the sequence's seed and the token's number, so that neither other
sequences nor drafts change the tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import torch

from server.model.categorical import StoredWeights, largest
from server.model.drawing import Softmax, draw_tokens
from server.model.logits.grammar import constrained_rows, with_allowed_tokens
from server.model.logits.registry import LogitsProcessing
from server.model.logprobs import add_logprobs, score
from server.sequence import SampledToken, SampleRow


class Sampler:
    """Chooses tokens, and keeps the logits processors of sequences.

    ``softmax`` computes the weights that tokens are drawn by, None by torch's operations.
    """

    def __init__(self, softmax: Softmax | None = None) -> None:
        self._processing = LogitsProcessing()
        self._softmax = softmax or StoredWeights.softmax

    def sample(self, logits: torch.Tensor, draws: SequenceOf[SampleRow]) -> list[SampledToken | None]:
        """A token for each row of ``logits`` [len(draws), vocab].

        None where the row is not finite, and behind a draft that differs from the sampled token.
        """
        scored = [row for row, draw in enumerate(draws) if draw.known is not None]
        if not scored:
            return self._sample(logits, draws)
        others = [row for row, draw in enumerate(draws) if draw.known is None]
        tokens = dict(zip(others, self._sample(logits[others], [draws[row] for row in others]), strict=True))
        tokens |= zip(scored, score(logits[scored], [draws[row] for row in scored]), strict=True)
        return [tokens[row] for row in range(len(draws))]

    def _sample(self, logits: torch.Tensor, draws: SequenceOf[SampleRow]) -> list[SampledToken | None]:
        if not draws:
            return []
        raw_logits = logits.float()
        logits = self._processing(raw_logits, draws)
        constrained = constrained_rows(draws)
        if constrained:
            logits = with_allowed_tokens(logits, raw_logits, draws, constrained)
        values, likeliest = largest(logits)
        finite, greedy = values.isfinite().tolist(), likeliest.tolist()  # of a row with NaN the largest is NaN
        chosen: list[int | None] = [
            token if is_finite else None for token, is_finite in zip(greedy, finite, strict=True)
        ]
        rows = [row for row, draw in enumerate(draws) if finite[row] and not draw.sequence.params.greedy]
        if rows:
            selected = logits if len(rows) == len(draws) else logits[rows]
            most = values if len(rows) == len(draws) else values[rows]
            drawn = draw_tokens(selected, most, [draws[row] for row in rows], self._softmax)
            for row, token in zip(rows, drawn, strict=True):
                chosen[row] = token
        for row, constraint in constrained.items():
            if constraint.forced is not None and finite[row]:
                chosen[row] = constraint.forced
        tokens = _up_to_wrong_draft(chosen, draws)
        asking = [
            row
            for row, draw in enumerate(draws)
            if draw.sequence.params.num_logprobs is not None and tokens[row] is not None
        ]
        if asking:
            add_logprobs(tokens, raw_logits, draws, asking)
        return tokens


def _up_to_wrong_draft(token_ids: SequenceOf[int | None], draws: SequenceOf[SampleRow]) -> list[SampledToken | None]:
    tokens: list[SampledToken | None] = []
    before: int | None = None
    for token_id, draw in zip(token_ids, draws, strict=True):
        is_right = draw.given is None or draw.given == before
        before = token_id if is_right else None
        tokens.append(None if before is None else SampledToken(before))
    return tokens
