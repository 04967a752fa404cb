"""``logit_bias``: numbers added to the logits of given tokens."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import torch

from server.sequence import Sequence


class LogitBias:
    """Adds a number to the logit of each given token."""

    def __init__(self, biases: SequenceOf[tuple[int, float]]) -> None:
        self._ids = torch.tensor([token for token, _ in biases])
        self._biases = torch.tensor([bias for _, bias in biases], dtype=torch.float32)

    def __call__(self, logits: torch.Tensor, sequence: Sequence, drafts: SequenceOf[int]) -> torch.Tensor:
        """Logits [vocab], changed in place."""
        logits[self._ids.to(logits.device)] += self._biases.to(logits.device)
        return logits
