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
        top = sorted(zip(row_ids[1:], row_logprobs[1:], strict=True), key=lambda pair: (-pair[1], pair[0]))
        tokens[row] = SampledToken(row_ids[0], row_logprobs[0], tuple(top[:count]))


def _log_totals(logits: torch.Tensor) -> Doubles:
    """Log-sum-exp of each row of logits [rows, vocab]; sums of blocks are added up as doubles."""
    largest = logits.amax(-1, keepdim=True)
    sums = totals(on_host(block_sums((logits - largest).exp_())))
    log_sums: Doubles = np.log(sums)
    return log_sums + on_host(largest)[:, 0]
