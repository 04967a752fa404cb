"""The interface of logits processors."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import Protocol

import torch

from server.sequence import Sequence


class LogitsProcessor(Protocol):
    """Changes the logits of one sequence, row by row; made once per sequence, from the value of its field.

    It may keep state about ``sequence.output_ids``, which only grows, but none about drafts, which may be rejected.
    """

    def __call__(self, logits: torch.Tensor, sequence: Sequence, drafts: SequenceOf[int]) -> torch.Tensor:
        """Logits [vocab] of the token behind prompt, output and ``drafts``; they may be written into."""
        ...
