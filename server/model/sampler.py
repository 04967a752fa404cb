"""Logits to tokens: greedy, or drawn with temperature, top-k, top-p and min-p from the sequence's own generator."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import torch

from server.sequence import SamplingParams, Sequence


class Sampler:
    """Keeps one ``torch.Generator`` for each sampled sequence, so that a seed gives the same tokens in any batch."""

    def __init__(self) -> None:
        self._generators: dict[int, torch.Generator] = {}

    def sample(self, logits: torch.Tensor, sequences: SequenceOf[Sequence]) -> list[int | None]:
        """One token for each row of ``logits`` [len(sequences), vocab]; None where the row is not finite."""
        if not sequences:
            return []
        logits = logits.float()
        likeliest = logits.max(dim=-1)
        finite = (likeliest.values.isfinite() & ~logits.isnan().any(dim=-1)).tolist()
        greedy = likeliest.indices.tolist()
        tokens: list[int | None] = []
        for row, sequence in enumerate(sequences):
            if not finite[row]:
                tokens.append(None)
            elif sequence.params.greedy:
                tokens.append(greedy[row])
            else:
                tokens.append(self._draw(logits[row], sequence))
        return tokens

    def forget(self, sequence_id: int) -> None:
        """Drop the generator of a sequence that has ended."""
        self._generators.pop(sequence_id, None)

    def _draw(self, logits: torch.Tensor, sequence: Sequence) -> int:
        probabilities, ids = filtered(logits.cpu(), sequence.params)
        generator = self._generators.get(sequence.id)
        if generator is None:
            generator = self._generators[sequence.id] = torch.Generator()
            if sequence.params.seed is None:
                generator.seed()
            else:
                generator.manual_seed(sequence.params.seed)
        uniform = torch.rand((), generator=generator, dtype=torch.float64)
        cumulative = probabilities.double().cumsum(0)
        place = int(torch.searchsorted(cumulative, uniform * cumulative[-1], right=True))
        return int(ids[min(place, len(ids) - 1)])


def filtered(logits: torch.Tensor, params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor]:
    """Candidates' probabilities and token ids, likeliest first, for one row of logits [vocab].

    In transformers' order: temperature, top-k, top-p (Holtzman et al. 2020), min-p (Nguyen et al. 2024).
    The likeliest token is never filtered out.
    """
    scaled = logits / params.temperature
    width = min(params.top_k, len(scaled)) if params.top_k else len(scaled)
    values, ids = torch.topk(scaled, width) if width < len(scaled) else scaled.sort(descending=True, stable=True)
    probabilities = values.softmax(0)
    keep = torch.ones_like(probabilities, dtype=torch.bool)
    if params.top_p < 1.0:
        keep &= probabilities.cumsum(0) - probabilities < params.top_p
    if params.min_p > 0.0:
        keep &= probabilities >= params.min_p * probabilities[0]
    keep[0] = True
    return probabilities[keep], ids[keep]
