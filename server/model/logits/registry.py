"""All logits processors, and how they are applied to the rows of a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from typing import Any
from weakref import WeakKeyDictionary

import torch

from server.model.logits.bias import LogitBias
from server.model.logits.min_tokens import MinTokens
from server.model.logits.penalties import FrequencyPenalty, PresencePenalty, RepetitionPenalty
from server.model.logits.processor import LogitsProcessor
from server.sequence import SampleRow, Sequence

PROCESSORS: Mapping[str, Callable[[Any], LogitsProcessor]] = {
    "repetition_penalty": RepetitionPenalty,
    "frequency_penalty": FrequencyPenalty,
    "presence_penalty": PresencePenalty,
    "logit_bias": LogitBias,
    "min_tokens": MinTokens,
}
"""A request's field -> what makes a processor of its value, in the order in which they are applied."""


class LogitsProcessing:
    """The processors of each sequence, kept as long as the sequence lives."""

    def __init__(self) -> None:
        self._processors: WeakKeyDictionary[Sequence, list[LogitsProcessor]] = WeakKeyDictionary()

    def __call__(self, logits: torch.Tensor, draws: SequenceOf[SampleRow]) -> torch.Tensor:
        """Processed logits [len(draws), vocab]; the same tensor if no row has a processor."""
        if not any(draw.sequence.params.processors for draw in draws):
            return logits
        rows = list(logits)
        drafts: list[int] = []
        for number, draw in enumerate(draws):
            drafts = [] if draw.given is None else [*drafts, draw.given]
            if processors := self._processors_of(draw.sequence):
                row = rows[number].clone()
                for processor in processors:
                    row = processor(row, draw.sequence, drafts)
                rows[number] = row
        return torch.stack(rows)

    def _processors_of(self, sequence: Sequence) -> list[LogitsProcessor]:
        if not sequence.params.processors:
            return []
        found = self._processors.get(sequence)
        if found is None:
            values = dict(sequence.params.processors)
            found = [make(values[name]) for name, make in PROCESSORS.items() if name in values]
            self._processors[sequence] = found
        return found
