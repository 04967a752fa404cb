"""Penalties on tokens that occurred before. Drafts before the row count as well."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import torch

from server.model.logits.token_counts import TokenCounts
from server.sequence import Sequence


class FrequencyPenalty:
    """OpenAI's: subtracts ``penalty`` for each occurrence of the token in the output."""

    def __init__(self, penalty: float) -> None:
        self._penalty, self._output = penalty, TokenCounts()

    def __call__(self, logits: torch.Tensor, sequence: Sequence, drafts: SequenceOf[int]) -> torch.Tensor:
        """Logits [vocab], changed in place."""
        ids, counts = self._output.of(sequence.output_ids, drafts, logits.device)
        logits[ids] -= self._penalty * counts
        return logits


class PresencePenalty:
    """OpenAI's: subtracts ``penalty`` once if the token occurs in the output."""

    def __init__(self, penalty: float) -> None:
        self._penalty, self._output = penalty, TokenCounts()

    def __call__(self, logits: torch.Tensor, sequence: Sequence, drafts: SequenceOf[int]) -> torch.Tensor:
        """Logits [vocab], changed in place."""
        ids, _ = self._output.of(sequence.output_ids, drafts, logits.device)
        logits[ids] -= self._penalty
        return logits


class RepetitionPenalty:
    """Keskar et al. 2019 as in transformers: tokens of prompt and output have positive logits divided by ``penalty``.

    Negative ones are multiplied by it.
    """

    def __init__(self, penalty: float) -> None:
        self._penalty = penalty
        self._seen: TokenCounts | None = None

    def __call__(self, logits: torch.Tensor, sequence: Sequence, drafts: SequenceOf[int]) -> torch.Tensor:
        """Logits [vocab], changed in place."""
        if self._seen is None:
            self._seen = TokenCounts(sequence.prompt_ids)
        ids, _ = self._seen.of(sequence.output_ids, drafts, logits.device)
        seen = logits[ids]
        logits[ids] = torch.where(seen > 0, seen / self._penalty, seen * self._penalty)
        return logits
