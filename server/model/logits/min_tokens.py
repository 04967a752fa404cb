"""``min_tokens``: the least number of output tokens."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import torch

from server.sequence import Sequence


class MinTokens:
    """Tokens that end the sequence cannot be chosen before ``least`` others were."""

    def __init__(self, least: int) -> None:
        self._least = least

    def __call__(self, logits: torch.Tensor, sequence: Sequence, drafts: SequenceOf[int]) -> torch.Tensor:
        """Logits [vocab], changed in place."""
        if len(sequence.output_ids) + len(drafts) < self._least:
            ends = [token for token in sequence.eos_ids if token < len(logits)]
            logits[ends] = -torch.inf
        return logits
