"""Grammars: rows of constrained sequences get only the tokens that may follow, or the one that must.

A grammar comes after all processors: none of them can allow what it forbids, nor take its last token.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf

import torch

from server.sequence import ConstrainedRow, SampleRow


def constrained_rows(draws: SequenceOf[SampleRow]) -> dict[int, ConstrainedRow]:
    """What may follow in each row of a sequence with a grammar, by the row's number.

    Rows behind a draft that the grammar does not allow are left out: no token of theirs is used.
    """
    found: dict[int, ConstrainedRow] = {}
    for first, draw in enumerate(draws):
        matcher = draw.sequence.matcher
        if matcher is None or draw.given is not None:
            continue
        drafts: list[int] = []
        for following in draws[first + 1 :]:
            if following.given is None:
                break
            drafts.append(following.given)
        rows = matcher.rows(drafts, draw.sequence.eos_ids)
        found |= {first + place: row for place, row in enumerate(rows) if row is not None}
    return found


def with_allowed_tokens(
    logits: torch.Tensor, raw_logits: torch.Tensor, draws: SequenceOf[SampleRow], rows: Mapping[int, ConstrainedRow]
) -> torch.Tensor:
    """Logits [len(draws), vocab] that are minus infinity where a row's grammar does not allow the token.

    Where processors have left none of the allowed tokens, as ``min_tokens`` does with the last end token, the
    ``raw_logits`` of before decide.
    """
    logits = logits.clone()
    for number, row in rows.items():
        if row.allowed is None:
            continue
        forbidden = torch.from_numpy(~row.allowed).to(logits.device)
        logits[number].masked_fill_(forbidden, -torch.inf)
        if draws[number].sequence.params.processors and bool(logits[number].isneginf().all()):
            logits[number] = raw_logits[number].masked_fill(forbidden, -torch.inf)
    return logits
