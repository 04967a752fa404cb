"""The seam between the model's logits and the choice of a token."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import Protocol

import torch

from server.sequence import Sequence


class LogitsProcessor(Protocol):
    """Changes the logits of one sequence, row by row; made once for the sequence, from the value of its field.

    It may keep what it has counted of ``sequence.output_ids``, which only grows. Drafts may turn out to be wrong, so
    nothing of them may be kept.
    """

    def __call__(self, logits: torch.Tensor, sequence: Sequence, drafts: SequenceOf[int]) -> torch.Tensor:
        """Logits [vocab] of the token behind prompt, output and ``drafts``; they may be written into."""
        ...
