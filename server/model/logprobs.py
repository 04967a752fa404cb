"""Log probabilities of chosen tokens and of the likeliest ones, by the model's distribution.

That is the softmax of the raw logits: before penalties, biases, temperature and filters, as in OpenAI's API and in vLLM
(there ``raw_logprobs``). Rows whose sequences do not ask for it are skipped.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import numpy as np
import torch

from server.model.categorical import Doubles, block_sums, on_host, totals
from server.model.drawing import likeliest
from server.sequence import SampledToken, SampleRow

_SCORED_TOGETHER = 32
"""Rows of a prompt whose log probabilities are computed at once: the copies of their logits take memory."""

_SCORED_BYTES = 64 << 20
_LEAST_SCORED = 16


def max_scored_rows(vocab_size: int) -> int:
    """Rows of prompts to compute log probabilities of in a step, so that their logits take at most 64 MiB."""
    return max(_LEAST_SCORED, _SCORED_BYTES // (4 * vocab_size))


def add_logprobs(
    tokens: list[SampledToken | None], logits: torch.Tensor, draws: SequenceOf[SampleRow], rows: SequenceOf[int]
) -> None:
    """Put log probabilities into the tokens of ``rows``, which are not None, by logits [len(draws), vocab], float32."""
    selected = logits if len(rows) == len(draws) else logits[rows]
    counts = [draws[row].sequence.params.num_logprobs or 0 for row in rows]
    width = min(max(counts), logits.shape[1])
    chosen = [token.id for token in (tokens[row] for row in rows) if token is not None]
    ids = torch.tensor(chosen, device=logits.device)[:, None]
    if width:
        ids = torch.cat([ids, likeliest(selected, width)], dim=1)
    logprobs = on_host(selected.gather(1, ids)) - _log_totals(selected)[:, None]
    for row, count, row_ids, row_logprobs in zip(rows, counts, ids.tolist(), logprobs.tolist(), strict=True):
        top = sorted(zip(row_ids[1:], row_logprobs[1:], strict=True), key=_by_logprob)
        tokens[row] = SampledToken(row_ids[0], row_logprobs[0], tuple(top[:count]))


def score(logits: torch.Tensor, draws: SequenceOf[SampleRow]) -> list[SampledToken | None]:
    """The known token of each row of logits [len(draws), vocab], with its rank; None where the row is not finite."""
    tokens: list[SampledToken | None] = []
    for first in range(0, len(draws), _SCORED_TOGETHER):
        rows = slice(first, first + _SCORED_TOGETHER)
        tokens += _score_block(logits[rows].float(), draws[rows])
    return tokens


def _score_block(logits: torch.Tensor, draws: SequenceOf[SampleRow]) -> list[SampledToken | None]:
    counts = [draw.sequence.params.num_prompt_logprobs or 0 for draw in draws]
    width = min(max(counts), logits.shape[1])
    is_finite = logits.amax(-1).isfinite()  # NaN of a row that has one
    logits = logits.masked_fill(~is_finite[:, None], 0.0)
    ids = torch.tensor([[draw.known] for draw in draws], device=logits.device)
    known = logits.gather(1, ids)
    ranks = ((logits > known).sum(-1) + 1).tolist()
    if width:
        ids = torch.cat([ids, likeliest(logits, width)], dim=1)
    logprobs = on_host(logits.gather(1, ids)) - _log_totals(logits)[:, None]
    tokens: list[SampledToken | None] = []
    for row, (row_ids, row_logprobs) in enumerate(zip(ids.tolist(), logprobs.tolist(), strict=True)):
        top = sorted(zip(row_ids[1:], row_logprobs[1:], strict=True), key=_by_logprob)[: counts[row]]
        token = SampledToken(row_ids[0], row_logprobs[0], tuple(top), ranks[row])
        tokens.append(token if is_finite[row] else None)
    return tokens


def _by_logprob(pair: tuple[int, float]) -> tuple[float, int]:
    """The sort key of an id and its log probability: the likeliest first, of equal ones the least id."""
    return -pair[1], pair[0]


def _log_totals(logits: torch.Tensor) -> Doubles:
    """Log-sum-exp of each row of logits [rows, vocab]; sums of blocks are added up as doubles."""
    largest = logits.amax(-1, keepdim=True)
    sums = totals(on_host(block_sums((logits - largest).exp_())))
    log_sums: Doubles = np.log(sums)
    return log_sums + on_host(largest)[:, 0]
