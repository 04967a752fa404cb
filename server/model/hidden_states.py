"""The hidden states behind the last norm, for embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from server.sequence import Doubles, Segment


@dataclass
class LastHiddenStates:
    """``states`` [rows, hidden], after a forward pass."""

    states: torch.Tensor | None = None


@contextmanager
def last_hidden_states(model: PreTrainedModel) -> Iterator[LastHiddenStates]:
    """Keep what the decoder hands to the head, in forward passes within the block."""
    kept = LastHiddenStates()

    def keep(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        kept.states = output.last_hidden_state[0]

    hook = model.base_model.register_forward_hook(keep)
    try:
        yield kept
    finally:
        hook.remove()


def hidden_sums(states: torch.Tensor | None, segments: Sequence[Segment]) -> dict[int, Doubles]:
    """The sum over the rows of each segment that asks for an embedding, [hidden] by sequence id."""
    assert states is not None, "the decoder was not called"
    sums = {}
    row = 0
    for segment in segments:
        rows = states[row : row + segment.length]
        row += segment.length
        if segment.every_row and segment.sequence.params.embedding:
            sums[segment.sequence.id] = rows.float().cpu().numpy().sum(axis=0, dtype=np.float64)
    return sums
